"""Have a language model write answers to guest reviews, and read one while it is written: clean on CPUs, the model last.

The model comes from the hub; the variable MODEL names another one, or a folder.

headrace serve examples/reply.py &
python examples/reply.py --url http://127.0.0.1:8000
"""

import argparse
import os

import headrace as hr


@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    return {"text": [" ".join(t.split()) for t in text]}


write = hr.LLM(
    out="reply",
    model=os.environ.get("MODEL", "Qwen/Qwen3-0.6B"),
    system="You run a small hotel. Answer the guest in two friendly sentences.",
    prompt="{text}",
    sampling=hr.Sampling(max_tokens=96),
    on=[hr.gpu(1), hr.cpu(2)],
    engine={"max_model_len": 2048},
)
replies = hr.Pipeline("replies", clean, write)


def main(url: str, review: str) -> None:
    with hr.Client(url, timeout_s=60) as client:
        answer = client.replies.write({"text": review})
        for piece in answer:  # as the model writes it
            print(piece, end="", flush=True)
        print()
        assert answer.row == client.replies({"text": review})  # the same row, all at once
        print(f"to: {answer.row['text']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--review", default="The  room was quiet,   but breakfast was cold.")
    main(**vars(parser.parse_args()))
