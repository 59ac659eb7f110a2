"""The echo service in headrace."""

import headrace as hr


@hr.stage(out={"text": str})
def strip(text: hr.Column[str]):
    return {"text": [one.strip() for one in text]}


echo = hr.Pipeline("echo", strip)
