"""The embedding by hand: one FastAPI process that calls the model for each request."""

import threading
from contextlib import asynccontextmanager

from embedding import Encoder, clean, tokenizer
from fastapi import FastAPI
from pydantic import BaseModel

state = {}


@asynccontextmanager
async def lifespan(app):
    state.update(tokenizer=tokenizer(), encoder=Encoder(), lock=threading.Lock())
    yield


app = FastAPI(lifespan=lifespan)


class Row(BaseModel):
    text: str


@app.post("/reviews")
def reviews(row: Row) -> dict:
    text = clean(row.text)
    ids = state["tokenizer"].encode(text).ids
    with state["lock"]:
        vector = state["encoder"]([ids])[0]
    return {"text": text, "vector": vector.tolist()}
