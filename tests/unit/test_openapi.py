"""What a service says about itself: the document is valid and true, and the page is safe to open."""

import datetime as dt
import html
import html.parser
import json
import re
import shlex

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

import headrace as hr
from headrace.arrays import table
from headrace.gateway.openai.asked import MOST_CHOICES
from headrace.serving.bodies import openapi
from headrace.serving.bodies.codec import Codec, sample
from headrace.serving.routes import Limits
from headrace.serving.wire import Content
from headrace.speech import CHAT, COMPLETIONS, Speech

LIMITS = Limits(rows=100, body_bytes=1 << 20, deadline_s=30)
OUT = {"vector": hr.Vector(3), "score": float, "words": list[str | None] | None, "at": dt.datetime, "copy": hr.Image}


@hr.stage(out=OUT)
def everything(
    text: hr.Column[str],
    image: hr.Column[hr.Image],
    at: hr.Column[dt.datetime | None],
    day: hr.Column[dt.date],
    flag: hr.Column[bool],
    count: hr.Column[int],
    ids: hr.Column[hr.Vector(dtype="int32")],
    lists: hr.Column[list[list[float]]],
    what: hr.Column,
):
    return {}


def pipeline(name="reviews", **columns):
    @hr.stage(out={"length": int})
    def length(text: hr.Column):
        return {"length": text}

    return hr.Pipeline(name, length, inputs={**columns, "text": str} if columns else None)


EVERY = hr.Pipeline("every", everything)
CONTRACT = openapi.contract(EVERY)


def document(contract=CONTRACT, *, keys=False, **more):
    return openapi.document(contract, LIMITS, keys=keys, **more)


def validator(document, name):
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document["components"]})


def test_the_contract_is_plain_json():
    """It says each column's type twice, for people and validators, and holds a row that the service takes."""
    assert json.loads(json.dumps(CONTRACT)) == CONTRACT
    assert CONTRACT["inputs"]["at"] == {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}], "headrace": "datetime | None"}
    assert CONTRACT["required"] == ["text", "image", "day", "flag", "count", "ids", "lists", "what"]
    assert [column["headrace"] for column in CONTRACT["outputs"].values()] == ["Vector(3)", "float", "list[str | None] | None", "datetime", "image"]
    codec = Codec(EVERY.inputs, {}, rows=1)
    row = codec.table([codec.decode(json.dumps(CONTRACT["sample"]).encode(), Content.JSON)])
    assert row.equals(table([sample(EVERY.inputs)], EVERY.inputs))


def test_the_schema_of_rows_and_answers():
    """Each is a JSON schema by itself."""
    made = openapi.schema(CONTRACT)
    for part in ("row", "answer"):
        jsonschema.Draft202012Validator.check_schema(made[part])
    jsonschema.Draft202012Validator(made["row"]).validate(CONTRACT["sample"])
    assert made["inputs"] == CONTRACT["inputs"] and made["pipeline"] == "every"


@pytest.mark.parametrize("keys", [False, True])
def test_the_document_is_valid(keys):
    """By the schema of OpenAPI 3.1, its examples by their own."""
    made = document(keys=keys)
    OpenAPIV31SpecValidator(made).validate()
    for name in ("Row", "Rows"):
        validator(made, name).validate(made["components"]["schemas"][name]["examples"][0])
    for example in made["paths"]["/every"]["post"]["requestBody"]["content"]["application/json"]["examples"].values():
        assert validator(made, "Row").is_valid(example["value"]) or validator(made, "Rows").is_valid(example["value"])


def test_answers_are_as_the_document_says():
    """Those of the codec, and failures."""
    made = document()
    codec = Codec({}, EVERY.outputs, rows=10)
    data = table([sample(EVERY.outputs), {**sample(EVERY.outputs), "score": float("nan"), "words": None}], EVERY.outputs)
    one, both = codec.encode(data, [(1, 2, True, Content.JSON), (0, 2, False, Content.JSON)])
    validator(made, "Answer").validate(json.loads(one))
    validator(made, "Answers").validate(json.loads(both))
    error = {"error": {"code": "invalid_row", "message": "m", "details": [{"loc": ["rows", 3, "text"], "message": "m"}]}, "request_id": "r"}
    validator(made, "Error").validate(error)


def test_keys():
    """Where they are asked for, there is a scheme for each way to present one, probes go without, and a request may be unauthorized."""
    with_keys, without = document(keys=True), document()
    assert {scheme["type"] for scheme in with_keys["components"]["securitySchemes"].values()} == {"http", "apiKey"}
    assert "401" in with_keys["paths"]["/every"]["post"]["responses"] and with_keys["paths"]["/healthz"]["get"]["security"] == []
    assert "security" not in without and "401" not in json.dumps(without)


class Talker:
    """Stands for a language model."""

    def speaks(self):
        return Speech("acme/tiny", (CHAT, COMPLETIONS))

    def __call__(self, text: hr.Column[str]):
        return {"said": text}


@pytest.mark.parametrize("keys", [False, True])
def test_a_language_model_has_openais_paths_beside_its_own(keys):
    """Those that it answers; on the page, too, and what is taken is what the door takes."""
    talk = hr.Pipeline("talk", hr.stage(out={"said": str})(Talker)())
    made = document(openapi.contract(talk), keys=keys)
    OpenAPIV31SpecValidator(made).validate()
    assert [path for path in made["paths"] if path.startswith("/v1/")] == [CHAT, COMPLETIONS, "/v1/models", "/v1/models/{model}"]
    assert ("401" in made["paths"][CHAT]["post"]["responses"]) == keys == ("OpenAI401" in made["components"]["responses"])
    chat = validator(made, "OpenAIChatRequest")
    chat.validate({"model": "talk", "messages": [{"role": "user", "content": "a"}], "n": MOST_CHOICES, "top_k": 3})
    assert not chat.is_valid({"model": "talk", "messages": []}) and not chat.is_valid(
        {"model": "talk", "messages": [{"role": "user", "content": "a"}], "n": 17}
    )
    assert MOST_CHOICES == 16
    page = openapi.page(made)
    assert CHAT in page and "/v1/models" in page and "{model}" not in page and not read(page).tags & {"script", "form"}


def test_files_and_guests_of_a_language_models_address():
    """Files and batches where they are kept; whoever is behind the address is a model to ask."""
    talk, write = (hr.Pipeline(name, hr.stage(out={"said": str})(Talker)()) for name in ("talk", "write"))
    made = document(openapi.contract(talk), files=True, guests=[openapi.contract(write), CONTRACT])
    OpenAPIV31SpecValidator(made).validate()
    assert [path for path in made["paths"] if path.startswith("/v1/") and "models" not in path][2:] == [
        "/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content", "/v1/batches", "/v1/batches/{batch_id}", "/v1/batches/{batch_id}/cancel",
    ]  # fmt: skip
    assert made["components"]["schemas"]["OpenAIChatRequest"]["properties"]["model"]["enum"] == ["acme/tiny", "talk", "write"]
    order = made["paths"]["/v1/batches"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert order["properties"]["endpoint"]["enum"] == [CHAT, COMPLETIONS]
    assert "/v1/batches" in openapi.page(made)


def test_what_is_told_of_a_request():
    """Headers, statuses and bounds."""
    post = document(keys=True)["paths"]["/every"]["post"]
    assert [one["name"] for one in post["parameters"]] == ["X-Request-Timeout", "X-Priority", "X-Request-ID"]
    assert list(post["responses"]) == ["200", "400", "401", "404", "406", "408", "413", "415", "422", "429", "500", "503", "504"]
    assert list(post["requestBody"]["content"]) == ["application/json", "application/vnd.apache.arrow.stream", "application/x-ndjson"]
    assert "Retry-After" in document()["components"]["responses"]["429"]["headers"]
    assert document()["components"]["schemas"]["Rows"]["properties"]["rows"]["maxItems"] == 100


def test_text_that_is_sent_as_it_is_written():
    """A pipeline whose last stage writes text says so, in the document and on the page; others do not."""
    written = openapi.contract(hr.Pipeline("notes", hr.LLM(model="acme/small", prompt="{text}", out="note")))
    made = document(written)
    OpenAPIV31SpecValidator(made).validate()
    told = made["paths"]["/notes"]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]["description"]
    assert openapi.schema(written)["streams"] == "note" and '{"column": "note", "text": "a piece"}' in told and "event: row" in told
    assert "event: row" in openapi.page(made) and "event: row" not in openapi.page(document())
    assert "text/event-stream" not in document()["paths"]["/every"]["post"]["responses"]["200"]["content"]


def test_a_column_named_rows():
    """Alone it leaves only the form for several rows; beside columns that may be left out it may not stand alone."""

    @hr.stage(out={"length": int})
    def length(rows: hr.Column[str]):
        return {}

    @hr.stage(out={"more": int})
    def more(note: hr.Column[str | None]):
        return {}

    def body(*stages):
        made = document(openapi.contract(hr.Pipeline("p", *stages)))
        OpenAPIV31SpecValidator(made).validate()
        assert openapi.page(made)
        form = made["paths"]["/p"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return jsonschema.Draft202012Validator({**form, "components": made["components"]})

    alone, beside = body(length), body(length, more)
    assert alone.is_valid({"rows": [{"rows": "a"}]}) and not alone.is_valid({"rows": "a"})
    assert beside.is_valid({"rows": [{"rows": "a"}]}) and not beside.is_valid({"rows": "a"}) and beside.is_valid({"rows": "a", "note": None})


class Reader(html.parser.HTMLParser):
    """The text of a page, what it refers to, and whether its elements are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.texts, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "action")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


@pytest.mark.parametrize("keys", [False, True])
def test_the_page_asks_for_nothing(keys):
    """No script, no form, no address but paths of the service itself; its own policy says the same."""
    page = openapi.page(document(keys=keys))
    reader = read(page)
    assert not reader.tags & {"script", "form", "iframe", "img", "object", "embed"}
    assert all(link == "data:," or re.fullmatch(r"/[a-z./]*", link) for link in reader.links)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page and not re.search(r"url\(|@import", page)
    assert ("$KEY" in page) == keys


def test_the_page_tells_what_there_is():
    """Every column with its type, every path, every code."""
    text = " ".join(read(openapi.page(document())).texts)
    assert not [name for part in ("inputs", "outputs") for name in CONTRACT[part] if name not in text]
    assert not [path for path in document()["paths"] if path not in text]
    assert all(word in text for word in ("invalid_row", "overloaded", "Retry-After", "X-Priority", "Vector(ragged, int32)", "a list of 3 numbers"))


def blocks(page):
    return [html.unescape(block) for block in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)]


@pytest.mark.parametrize("keys", [False, True])
def test_the_examples_can_be_copied(keys):
    """A shell and Python read them, and the shell's body is a row."""
    contract = openapi.contract(pipeline())
    curl, python, *_ = blocks(openapi.page(document(contract, keys=keys)))
    words = shlex.split(curl)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/reviews"] and json.loads(words[-1]) == contract["sample"]
    compile(python, "page", "exec")
    assert "client['reviews']" in python
    for block in blocks(openapi.page(document(keys=keys))):
        if "import headrace" in block:
            compile(block, "page", "exec")


def test_a_long_row_is_shown_short():
    """A vector of hundreds of numbers goes into a file."""
    page = openapi.page(document(openapi.contract(pipeline(vector=hr.Vector(384), text=str))))
    assert "@row.json" in page and "381 more" in page and "[0.5] * 384" in page and len(page) < 40_000


def test_whatever_a_pipeline_calls_its_columns():
    """Names are shown, never obeyed."""
    evil = "</code><script>alert('x')</script>\u202e`&\"'\\\n"
    contract = openapi.contract(pipeline(**{evil: str}))
    made = document(contract)
    OpenAPIV31SpecValidator(made).validate()
    page = openapi.page(made)
    assert "<script" not in page and "\u202e" not in page
    assert not read(page).tags & {"script"}
    curl, python, *_ = blocks(page)
    compile(python, "page", "exec")
    assert shlex.split(curl)[0] == "curl"
