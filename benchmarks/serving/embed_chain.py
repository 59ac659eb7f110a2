"""The embedding as three HTTP services behind each other: what prepares, the model, what finishes. PART=pre|model|post, NEXT=address of the one behind."""

import os
import threading
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
from embedding import Encoder, clean, tokenizer
from fastapi import FastAPI
from pydantic import BaseModel

state = {}
PART, NEXT = os.environ["PART"], os.environ.get("NEXT", "")


@asynccontextmanager
async def lifespan(app):
    if PART == "pre":
        state.update(tokenizer=tokenizer(), http=aiohttp.ClientSession())
    elif PART == "model":
        state.update(encoder=Encoder(), lock=threading.Lock())
    else:
        state.update(http=aiohttp.ClientSession())
    yield
    if "http" in state:
        await state["http"].close()


app = FastAPI(lifespan=lifespan)


class Row(BaseModel):
    text: str


class Tokens(BaseModel):
    text: str
    ids: list[int]


async def ask(body: dict) -> dict:
    async with state["http"].post(NEXT, json=body) as answer:
        answer.raise_for_status()
        return await answer.json()


if PART == "post":  # the door of the three: it asks for what it finishes

    @app.post("/reviews")
    async def reviews(row: Row) -> dict:
        found = await ask({"text": row.text})
        vector = np.asarray(found["vector"], np.float32)
        return {"text": found["text"], "vector": vector.tolist()}

elif PART == "pre":

    @app.post("/pre")
    async def pre(row: Row) -> dict:
        text = clean(row.text)
        return {"text": text, "vector": (await ask({"text": text, "ids": state["tokenizer"].encode(text).ids}))["vector"]}

else:

    @app.post("/model")
    def model(row: Tokens) -> dict:
        with state["lock"]:
            return {"vector": state["encoder"]([row.ids])[0].tolist()}
