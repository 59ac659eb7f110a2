"""Files behind OpenAI's Files API: what is kept, who sees it, and what is refused."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from batches import Clock, ask, depot_in, form, order, pieces, requests, upload

from headrace.errors import DefinitionError, StorageError
from headrace.gateway.batches import shelf
from headrace.gateway.batches.asgi import App
from headrace.gateway.batches.depot import Depot
from headrace.gateway.batches.limits import Limits

HEAD = b'--frontier\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
KIND = "multipart/form-data; boundary=frontier"


def contents(depot_folder: Path) -> list[str]:
    return os.listdir(depot_folder / "contents")


async def refused(depot: Depot, kind: str, *body: bytes) -> tuple[int, str | None, str | None]:
    return (await ask(depot, "POST", "/v1/files", body=pieces(*body), kind=kind)).error


def test_a_file_comes_and_goes(tmp_path: Path):
    async def test():
        content = os.urandom(3_000_000) + b"\r\n--frontie\r\n--frontieR\r\n--"
        with depot_in(tmp_path) as depot:
            kind, body = form(content, "Übung.jsonl", purpose="batch")
            made = await ask(depot, "POST", "/v1/files", body=pieces(*(body[at : at + 65_521] for at in range(0, len(body), 65_521))), kind=kind)
            name = made.value["id"]
            assert made.value == {
                "id": name,
                "object": "file",
                "bytes": len(content),
                "created_at": 1_800_000_000,
                "expires_at": 1_800_000_000 + 30 * 86_400,
                "filename": "Übung.jsonl",
                "purpose": "batch",
                "status": "processed",
                "status_details": None,
            }
            assert (await ask(depot, "GET", f"/v1/files/{name}")).value == made.value
            read = await ask(depot, "GET", f"/v1/files/{name}/content")
            assert read.body == content
            assert read.headers["content-disposition"] == "attachment; filename*=UTF-8''%C3%9Cbung.jsonl"
            assert (await ask(depot, "DELETE", f"/v1/files/{name}")).value == {"id": name, "object": "file", "deleted": True}
            for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
                assert (await ask(depot, method, f"/v1/files/{name}{path}")).error == (404, None, "id")
        assert contents(tmp_path) == []

    asyncio.run(test())


def test_nobody_sees_the_files_of_others(tmp_path: Path):
    async def test():
        with depot_in(tmp_path) as depot:
            name = await upload(depot, b"secret")
            for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
                assert (await ask(depot, method, f"/v1/files/{name}{path}", owner="bob")).error == (404, None, "id")
            assert (await ask(depot, "GET", "/v1/files", owner="bob")).value["data"] == []
            assert (await ask(depot, "GET", "/v1/files", owner="bob", after=name)).error == (400, "invalid_value", "after")
            wanted = {"input_file_id": name, "endpoint": "/v1/embeddings", "completion_window": "24h"}
            assert (await ask(depot, "POST", "/v1/batches", wanted, owner="bob")).error == (400, "file_not_found", "input_file_id")
            assert (await ask(depot, "GET", f"/v1/files/{name}/content")).body == b"secret"

    asyncio.run(test())


def test_files_are_listed_by_pages(tmp_path: Path):
    async def test():
        with depot_in(tmp_path) as depot:
            names = [await upload(depot, b"%d" % at) for at in range(5)]
            for order_, wanted in (("asc", names), ("desc", names[::-1])):
                found: list[str] = []
                query: dict[str, Any] = {"order": order_, "limit": 2, "purpose": "batch"}
                while True:
                    page = (await ask(depot, "GET", "/v1/files", **query)).value
                    found += [one["id"] for one in page["data"]]
                    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
                    if not page["has_more"]:
                        break
                    query["after"] = page["last_id"]
                assert found == wanted
            assert (await ask(depot, "GET", "/v1/files", purpose="batch_output")).value["data"] == []
            for query in ({"limit": 0}, {"limit": 10_001}, {"limit": "x"}, {"limit": "²"}, {"order": "up"}, {"after": "file-x"}):
                assert (await ask(depot, "GET", "/v1/files", **query)).error == (400, "invalid_value", next(iter(query)))

    asyncio.run(test())


def test_files_expire(tmp_path: Path):
    async def test():
        clock = Clock()
        with depot_in(tmp_path, clock) as depot:
            kind, body = form(b"x", purpose="batch", **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
            name = (await ask(depot, "POST", "/v1/files", body=pieces(body), kind=kind)).value["id"]
            clock.now += 3599
            assert (await ask(depot, "GET", f"/v1/files/{name}")).status == 200
            clock.now += 1
            assert (await ask(depot, "GET", f"/v1/files/{name}")).error == (404, None, "id")
            assert (await ask(depot, "GET", "/v1/files")).value["data"] == []
            depot.sweep()
            assert contents(tmp_path) == []
            for anchor, seconds, at in (
                ("now", "3600", "anchor"),
                ("created_at", "3599", "seconds"),
                ("created_at", "1e9", "seconds"),
                ("created_at", "²", "seconds"),
            ):
                kind, body = form(b"x", purpose="batch", **{"expires_after[anchor]": anchor, "expires_after[seconds]": seconds})
                assert await refused(depot, kind, body) == (400, "invalid_value", f"expires_after.{at}")
        assert contents(tmp_path) == []

    asyncio.run(test())


def test_bytes_that_nobody_named_are_swept_once_they_are_old(tmp_path: Path):
    async def test():
        with depot_in(tmp_path) as depot:
            name = await upload(depot, b"x")
            left = depot.shelf.begin("file-" + "0" * 32)
            left.close()
            depot.sweep()
            assert len(contents(tmp_path)) == 2
            depot.sweep(orphan_s=-1)
            assert contents(tmp_path) == [name]

    asyncio.run(test())


@pytest.mark.parametrize(
    ("kind", "body", "error"),
    [
        ("", b"", (400, None, None)),
        ("application/json", b"{}", (400, None, None)),
        ("multipart/form-data", HEAD, (400, None, None)),
        (f"multipart/form-data; boundary={'x' * 300}", HEAD, (400, None, None)),
        (KIND, b"", (400, None, None)),
        (KIND, b"nothing of the kind" * 1000, (400, None, None)),
        (KIND, HEAD + b"never closed", (400, None, None)),
        (KIND, HEAD + b"x\r\n--frontier", (400, None, None)),
        (KIND, b"--frontier\r\n" + b"A: " + b"x" * 100_000, (400, None, None)),
        (KIND, b"--frontier\r\n" + b"A: b\r\n" * 100, (400, None, None)),
        (KIND, b'--frontier\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n' * 17 + b"--frontier--\r\n", (400, None, None)),
        (KIND, b'--frontier\r\nContent-Disposition: form-data; name="x"\r\n\r\n' + b"x" * 5000, (400, None, None)),
        (KIND, b'--frontier\r\nContent-Disposition: form-data; name="\xff\xfe"\r\n\r\n', (400, None, None)),
        (KIND, HEAD + b"\r\n" + HEAD + b"\r\n--frontier--\r\n", (400, None, "file")),
        (*form(b"x"), (400, "missing_required_parameter", "purpose")),
        (*form(b"x", purpose="fine-tune"), (400, "invalid_value", "purpose")),
        (*form(b"x", None, purpose="batch"), (400, None, "file")),
        (*form(b"x", "", purpose="batch"), (400, None, "file")),
        (*form(b"x", "a\0b", purpose="batch"), (400, None, "file")),
        (*form(b"x", "a" * 256, purpose="batch"), (400, None, "file")),
        (KIND, b'--frontier\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--frontier--\r\n', (400, "missing_required_parameter", "file")),
    ],
)
def test_what_is_no_proper_form_is_refused_and_leaves_nothing(tmp_path: Path, kind: str, body: bytes, error: tuple[int, str | None, str | None]):
    async def test():
        with depot_in(tmp_path) as depot:
            assert await refused(depot, kind, body) == error
            assert await refused(depot, kind, *(body[at : at + 1] for at in range(min(len(body), 2000))), body[2000:]) == error
        assert contents(tmp_path) == []

    asyncio.run(test())


@pytest.mark.parametrize("filename", ["../../etc/passwd", "..\\..\\passwd", "/etc/passwd", "C:\\passwd"])
def test_a_file_name_leads_nowhere(tmp_path: Path, filename: str):
    async def test():
        with depot_in(tmp_path / "depot") as depot:
            kind, body = form(b"x", filename, purpose="batch")
            made = (await ask(depot, "POST", "/v1/files", body=pieces(body), kind=kind)).value
            assert made["filename"] == "passwd"
            assert contents(tmp_path / "depot") == [made["id"]]
            for name in ("..", "../catalog.sqlite", "%2e%2e", "file-" + "0" * 31 + "/", "file-\0"):
                assert (await ask(depot, "GET", f"/v1/files/{name}/content")).status == 404
                with pytest.raises(FileNotFoundError):
                    depot.shelf.open(name)

    asyncio.run(test())


def test_an_upload_is_bounded(tmp_path: Path):
    async def endless() -> AsyncIterator[bytes]:
        yield HEAD
        while True:
            yield b"x" * 10_000

    async def silent() -> AsyncIterator[bytes]:
        yield HEAD
        await asyncio.sleep(60)

    async def trickle() -> AsyncIterator[bytes]:
        yield HEAD
        while True:
            await asyncio.sleep(0.002)
            yield b"x"

    async def gone() -> AsyncIterator[bytes]:
        yield HEAD
        raise ConnectionResetError

    async def test():
        with depot_in(tmp_path, file_bytes=1_000_000, owner_bytes=1_500_000, idle_s=0.03, upload_s=0.08) as depot:
            for body, error in ((endless(), (413, "file_too_large", "file")), (silent(), (408, "timeout", None)), (trickle(), (408, "timeout", None))):
                reply = await ask(depot, "POST", "/v1/files", body=body, kind=KIND)
                assert reply.error == error and reply.headers["connection"] == "close"
            with pytest.raises(ConnectionResetError):
                await ask(depot, "POST", "/v1/files", body=gone(), kind=KIND)
            assert contents(tmp_path) == []
            await upload(depot, b"x" * 1_000_000)
            kind, body = form(b"x" * 600_000, purpose="batch")
            assert await refused(depot, kind, body) == (400, "storage_limit_exceeded", None)
            await upload(depot, b"x" * 600_000, owner="bob")
        assert len(contents(tmp_path)) == 2

    asyncio.run(test())


def test_a_full_disk_is_said_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def test():
        with depot_in(tmp_path) as depot:
            name = await upload(depot, b"kept")
            kind, body = form(b"x" * 3_000_000, purpose="batch")
            for call in ("pwrite", "fsync", "open"):
                with monkeypatch.context() as patch:
                    patch.setattr(shelf.os, call, _full)
                    reply = await ask(depot, "POST", "/v1/files", body=pieces(body), kind=kind)
                    assert reply.error == (507, "insufficient_storage", None) and reply.headers["x-should-retry"] == "false"
            with monkeypatch.context() as patch:
                patch.setattr(shelf.os, "pwrite", _broken)
                assert await refused(depot, kind, body) == (500, "storage_error", None)
            assert contents(tmp_path) == [name]
            assert (await ask(depot, "GET", f"/v1/files/{name}/content")).body == b"kept"
        with depot_in(tmp_path, free_bytes=1 << 60) as depot:
            assert await refused(depot, kind, body) == (507, "insufficient_storage", None)
            assert (await ask(depot, "DELETE", f"/v1/files/{name}")).status == 200

    asyncio.run(test())


def _full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def _broken(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EIO, "Input/output error")


def test_the_catalog_stays_whole_when_it_is_full(tmp_path: Path):
    async def test():
        with depot_in(tmp_path) as depot:
            name = await upload(depot, requests(1))
            pages = depot.catalog._writer.execute("PRAGMA page_count").fetchone()[0]
            depot.catalog._writer.execute(f"PRAGMA max_page_count = {pages}")
            kind, body = form(b"", "x" * 255, purpose="batch")
            replies = [await ask(depot, "POST", "/v1/files", body=pieces(body), kind=kind) for _ in range(100)]
            assert replies[-1].error == (507, "insufficient_storage", None)
            kept = sum(reply.status == 200 for reply in replies)
            assert len((await ask(depot, "GET", "/v1/files")).value["data"]) == kept + 1 == len(contents(tmp_path))
            assert (await ask(depot, "DELETE", f"/v1/files/{name}")).status == 200

    asyncio.run(test())


def test_bytes_that_a_batch_reads_stay_until_it_is_over(tmp_path: Path):
    async def test():
        with depot_in(tmp_path) as depot:
            batch = await order(depot, requests(2))
            name = (await ask(depot, "GET", "/v1/files")).value["data"][0]["id"]
            assert (await ask(depot, "DELETE", f"/v1/files/{name}")).status == 200
            assert (await ask(depot, "GET", f"/v1/files/{name}")).status == 404
            depot.sweep(orphan_s=-1)
            assert contents(tmp_path) == [name]
            depot.catalog.end(batch, lambda found: found.moved("failed", 0), [])
            depot.release(name)
            assert contents(tmp_path) == []

    asyncio.run(test())


def test_what_is_not_there_cannot_be_asked(tmp_path: Path):
    async def test():
        with depot_in(tmp_path) as depot:
            for method, path, status in (
                ("PUT", "/v1/files", 405),
                ("POST", "/v1/files/x", 405),
                ("DELETE", "/v1/batches/x", 405),
                ("GET", "/v1/batches/x/cancel", 405),
                ("GET", "/v1/files/x/y/z", 404),
                ("GET", "/v1/models", 404),
                ("GET", "/", 404),
            ):
                assert (await ask(depot, method, path)).error[0] == status, path

    asyncio.run(test())


def test_a_depot_tells_what_it_cannot_be(tmp_path: Path):
    with pytest.raises(DefinitionError, match="limit 'lines' must be a number above 0, got 0"):
        Limits(lines=0)
    with depot_in(tmp_path) as depot:
        depot.catalog._writer.execute("PRAGMA user_version = 7")
    with pytest.raises(StorageError, match="has version 7, and this headrace reads version 1"):
        depot_in(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot make"):
        depot_in(tmp_path / "file")


def test_processes_may_open_a_depot_at_once(tmp_path: Path):
    opened: list[Depot] = []
    threads = [threading.Thread(target=lambda: opened.append(depot_in(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 8
    for depot in opened:
        depot.close()


@contextmanager
def served(depot: Depot, **owners: str) -> Iterator[str]:
    """The depot behind uvicorn, where a key such as `sk-ann` belongs to `ann`."""
    uvicorn = pytest.importorskip("uvicorn")
    app = App(depot, lambda headers: owners.get(headers.get("authorization", "").removeprefix("Bearer ")))
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", ws="none", log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def test_openais_own_client_finds_what_it_expects(tmp_path: Path):
    openai = pytest.importorskip("openai")
    with depot_in(tmp_path) as depot, served(depot, ann="ann", bob="bob") as url:
        with openai.OpenAI(base_url=url, api_key="ann", max_retries=0) as client:
            content = requests(1000)
            files = [
                client.files.create(file=("a.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600 + at}) for at in range(3)
            ]
            assert [file.expires_at - file.created_at for file in files] == [3600, 3601, 3602]
            assert [file.id for file in client.files.list(limit=1, order="asc")] == [file.id for file in files]
            assert client.files.retrieve(files[0].id) == files[0]
            assert client.files.content(files[0].id).read() == content
            assert client.files.delete(files[0].id).deleted
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                client.files.retrieve(files[0].id)
            with pytest.raises(openai.BadRequestError) as caught:
                client.files.create(file=b"x", purpose="fine-tune")
            assert (caught.value.code, caught.value.param, caught.value.type) == ("invalid_value", "purpose", "invalid_request_error")

            batch = client.batches.create(input_file_id=files[1].id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"})
            assert (batch.status, batch.metadata, batch.request_counts.total) == ("validating", {"a": "b"}, 0)
            assert client.batches.retrieve(batch.id) == batch
            assert [one.id for one in client.batches.list(limit=1)] == [batch.id]
            assert client.batches.cancel(batch.id).status == "cancelling"
        with openai.OpenAI(base_url=url, api_key="bob", max_retries=0) as client:
            assert client.files.list().data == client.batches.list().data == []
            with pytest.raises(openai.NotFoundError, match="No batch found"):
                client.batches.cancel(batch.id)
        with openai.OpenAI(base_url=url, api_key="eve", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
            client.files.list()
