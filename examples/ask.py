"""Ask a running service from Python: one row, many, from async code, and a stream of any length; and what an error looks like.

headrace serve examples/hello.py &
python examples/ask.py --url http://127.0.0.1:8000
"""

import argparse
import asyncio
import itertools

import headrace as hr
from headrace.errors import RowError

TEXTS = ["A  quiet room, close to the station.", "LOUD at night!", "Would stay again.", ""]


def main(url: str) -> None:
    with hr.Client(url, timeout_s=20) as client:
        print("one row     ", client.hello({"text": TEXTS[0]}))
        print("many rows   ", [row["words"] for row in client.hello([{"text": text} for text in TEXTS])])

        async def at_once():
            return await asyncio.gather(*(client.hello.aio({"text": text}) for text in TEXTS))

        print("from asyncio", [round(row["shouting"], 2) for row in asyncio.run(at_once())])

        endless = ({"text": f"row {n}"} for n in itertools.count())  # read only as far as it is answered
        print("a stream    ", [row["text"] for row in itertools.islice(client.hello.stream(endless, chunk=50), 1000)][-1])

        try:
            client.hello({"txt": "a column that nobody reads"})
        except RowError as error:  # also a WiringError, as hello.local would raise
            print("a mistake   ", error)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    main(**vars(parser.parse_args()))
