"""What is asked of `headrace serve` is checked before anything starts."""

import importlib

import pytest

import headrace as hr
from headrace.errors import ServingError, SettingError
from headrace.serving.release.versions import Canary, Rolling, Shadow

options = importlib.import_module("headrace.cli.serve")  # the package has the command under this name


@pytest.mark.parametrize(("text", "value"), [("200ms", 0.2), ("1.5s", 1.5), ("2", 2.0), ("2 min", 120.0), ("1h", 3600.0)])
def test_times(text, value):
    assert options.seconds(text, "--latency") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "0", "-1s", "fast", "1 day"])
def test_times_that_are_none(text):
    with pytest.raises(SettingError, match="--latency .* must be a time"):
        options.seconds(text, "--latency")


@pytest.mark.parametrize(("text", "value"), [("16MB", 16_000_000), ("16MiB", 16 << 20), ("512k", 512_000), ("1.5GB", 1_500_000_000), ("100", 100)])
def test_sizes(text, value):
    assert options.size(text, "--max-body") == value


@pytest.mark.parametrize("text", ["", "0", "16 apples", "-1MB"])
def test_sizes_that_are_none(text):
    with pytest.raises(SettingError, match="--max-body .* must be a size"):
        options.size(text, "--max-body")


@pytest.mark.parametrize(("word", "found"), [("1:8", ("", (1, 8))), ("4", ("", (4, 4))), ("embed=0:2", ("embed", (0, 2)))])
def test_replicas(word, found):
    assert options.replica_bounds(word) == found


@pytest.mark.parametrize("word", ["", "0", "8:1", "a:b", "=1:2", "-1:2", "0:0", "1:2:3"])
def test_replicas_that_are_none(word):
    with pytest.raises(SettingError, match="--replicas"):
        options.replica_bounds(word)


def test_how_a_version_takes_over():
    assert options.takeover(None, None) == Rolling()
    assert options.takeover("5%", None) == Canary(share=0.05)
    assert options.takeover(None, "20%") == Shadow(share=0.2)
    with pytest.raises(SettingError, match="give one of them"):
        options.takeover("5%", "20%")
    for text in ("0", "120%", "half"):
        with pytest.raises(SettingError, match="--canary"):
            options.takeover(text, None)


def test_only_aliases_can_be_followed():
    @hr.stage(out={"length": int})
    class Measure:
        model: str = "models:/measure@prod"

        def __call__(self, text: hr.Column[str]):
            return {"length": [len(one) for one in text]}

    assert options.followed(None, []) is None
    assert options.followed("2min", [hr.Pipeline("measure", Measure())]) == 120.0
    with pytest.raises(SettingError, match="--follow 'often' must be a time"):
        options.followed("often", [hr.Pipeline("measure", Measure())])
    with pytest.raises(
        SettingError, match=r"no setting of 'measure' names a model by an alias, such as models:/name@prod; it has \"measure.model='models:/measure/3'\""
    ):
        options.followed("1min", [hr.Pipeline("measure", Measure(model="models:/measure/3"))])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host):
    options.exposed(host, keys=None, allow_no_keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.2", "::", "example.org"])
def test_the_world_needs_keys_or_words(host, tmp_path):
    with pytest.raises(ServingError, match="headrace keys create .* --allow-no-keys"):
        options.exposed(host, keys=None, allow_no_keys=False)
    options.exposed(host, keys=tmp_path / "keys.json", allow_no_keys=False)
    options.exposed(host, keys=None, allow_no_keys=True)


def test_tls_needs_both_files(tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_text("")
    for text in ("cert.pem", f"{certificate},", f"{certificate},{key}"):
        with pytest.raises(SettingError, match="--tls"):
            options.pair(text)
    key.write_text("")
    assert options.pair(f"{certificate},{key}") == (str(certificate), str(key))
