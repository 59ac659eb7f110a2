"""Rows that fail do not stop a job: they become dead letters, and are run again when the cause is mended.

headrace run examples/dead_letters.py --input examples/hello.csv --output letters-output --keep id --set parse.strict=true
headrace replay letters-output --set parse.strict=false
"""

import headrace as hr


@hr.stage(out={"greeting": str}, batch=1024)
class Parse:
    strict: bool = False

    def __call__(self, text: hr.Column[str]):
        words = [t.split() for t in text]
        if self.strict:
            for row in words:
                if len(row) < 3:
                    raise ValueError(f"too short: {' '.join(row)!r}")
        return {"greeting": [" ".join(row[:3]) for row in words]}


letters = hr.Pipeline("letters", Parse())
