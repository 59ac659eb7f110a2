"""multipart/form-data read as it comes: small fields are kept, the file is handed on piece by piece."""

from __future__ import annotations

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from headrace.gateway.batches.refusal import RefusedError

_MOST_PARTS = 16
_MOST_FIELD_BYTES = 4096
_MOST_NAME = 255


class Form:
    """One body. `fields` are its values by name; `filename` is that of its part `file`, once that has begun."""

    def __init__(self, content_type: str) -> None:
        """Nothing is read yet.

        Raises:
            RefusedError: the content type names no form, or not its boundary.
        """
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise RefusedError(400, "The body has to be multipart/form-data, and its Content-Type to name the boundary.")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._closed = False
        self._parts = 0
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._field: str | None = None  # the part that is being read, if it is a field
        self._content = bytearray()  # of that field
        self._file = bytearray()  # of the file, from the piece that is being read
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._take,
                    "on_part_end": self._end_part,
                    "on_end": self._close,
                },
            )
        except FormParserError as error:
            raise RefusedError(400, f"The body is no form: {error}") from error

    def feed(self, piece: bytes) -> bytes:
        """What the next piece of the body adds to the file.

        Raises:
            RefusedError: it is no form, or one with too much in it.
        """
        self._file = bytearray()
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise RefusedError(400, f"The body is no form: {error}") from error
        return bytes(self._file)

    def end(self) -> None:
        """The body has ended.

        Raises:
            RefusedError: in the middle of the form, or without a file.
        """
        if not self._closed:
            raise RefusedError(400, "The body ended before its closing boundary.")
        if self.filename is None:
            raise RefusedError(400, "Missing required parameter: 'file'.", param="file", code="missing_required_parameter")

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise RefusedError(400, f"The form has more than {_MOST_PARTS} parts, which is the most.")
        self._disposition = b""
        self._field = None

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        try:
            name = options.get(b"name", b"").decode()
            filename = options[b"filename"].decode() if b"filename" in options else None
        except UnicodeDecodeError:
            raise RefusedError(400, "A name in the form is not UTF-8.") from None
        if name != "file":
            self._field = name
            self._content = bytearray()
        elif filename is None:
            raise RefusedError(400, "The part 'file' has no file name.", param="file")
        elif self.filename is not None:
            raise RefusedError(400, "The form has two files; it can have one.", param="file")
        else:
            self.filename = _shown(filename)

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._file += data[start:end]
        elif len(self._content) + end - start > _MOST_FIELD_BYTES:
            raise RefusedError(400, f"A field of the form has more than {_MOST_FIELD_BYTES:,} bytes, which is the most.")
        else:
            self._content += data[start:end]

    def _end_part(self) -> None:
        if self._field is not None:
            self.fields[self._field] = self._content.decode("utf-8", "replace")

    def _close(self) -> None:
        self._closed = True


def _shown(filename: str) -> str:
    """A file's name as it is kept, which is for show only: without folders."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    if not 0 < len(name) <= _MOST_NAME or not name.isprintable():
        raise RefusedError(400, f"The file's name has to have 1 to {_MOST_NAME} printable characters.", param="file")
    return name
