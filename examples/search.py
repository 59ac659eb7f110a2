"""Search guest reviews: vectors from the batch job, and the service of the same file for what you type. Its cells open as a notebook.

headrace run examples/reviews.py --input ../shared/data/reviews.parquet --output vectors --keep review_id --limit 2000
headrace serve examples/reviews.py &
python examples/search.py --vectors vectors --url http://127.0.0.1:8000
"""

# %% Where things are

import argparse

import numpy as np
import pyarrow.parquet as pq

import headrace as hr

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--vectors", default="vectors", help="what headrace run wrote")
parser.add_argument("--url", default="http://127.0.0.1:8000", help="where headrace serve answers")
parser.add_argument("--ask", nargs="+", default=["no sleep because of the noise", "a friendly host", "dirty bathroom"], help="what to look for")
here, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own

# %% What the batch job computed: a row of `vectors` for each review

found = pq.read_table(here.vectors)
vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(len(found), -1)  # of length 1 each: a product is the cosine
print(f"{len(found):,} reviews, {vectors.shape[1]} numbers each")

# %% The service is the same pipeline: a review embedded there has the vector that the batch job gave it

client = hr.Client(here.url)
some = found.slice(0, 8)
again = client.reviews([{"text": text} for text in some["text"].to_pylist()])
apart = np.abs(np.stack([row["vector"] for row in again]) - vectors[:8]).max()
print(f"batch and service differ by {apart:.1e} at most")
assert apart < 1e-4

# %% Search: the service embeds the question, one product with all vectors ranks the reviews


def search(question: str, count: int = 3) -> list[tuple[float, str]]:
    scores = vectors @ client.reviews({"text": question})["vector"]
    return [(float(scores[at]), found["text"][at].as_py()) for at in (-scores).argsort()[:count]]


for question in here.ask:
    print(f"\n{question}")
    for score, text in search(question):
        print(f"  {score:.2f}  {text[:110]}")

# %% Done

client.close()
