"""The echo service by hand: FastAPI, validation by pydantic."""

from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()


class Row(BaseModel):
    text: str


@app.post("/echo")
async def echo(row: Row) -> Row:
    return Row(text=row.text.strip())
