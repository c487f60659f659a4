"""Records in files: what comes back, and what a damaged file says of itself."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fastattn
from fastattn.inspect import record
from fastattn.models import Transformer

pytest.importorskip("safetensors")


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(2)
    transformer = Transformer(20, 20, d_model=16, num_layers=2, num_heads=4, d_ff=32).eval()
    with torch.no_grad(), record(transformer, tokens=["a", "b", "键"], target_tokens=["x", "y"]) as rec:
        transformer(torch.randint(20, (2, 3)), torch.randint(20, (2, 2)))
    rec.save(tmp_path / "rec.safetensors")
    return rec, tmp_path / "rec.safetensors"


def test_save_and_load(saved):
    rec, path = saved
    back = fastattn.inspect.Record.load(str(path))
    assert str(back) == str(rec) and back.labels == rec.labels and back.missed == rec.missed
    for ours, theirs in zip(back, rec, strict=True):
        assert repr(ours) == repr(theirs)
        assert torch.equal(ours.weights, theirs.weights)
        for name, tensor in theirs.summary.tensors().items():
            assert torch.equal(getattr(ours.summary, name), tensor)
    assert back.texts("decoder.layers.0.cross_attn")[1] == ["a", "b", "键"]
    assert [file.name for file in path.parent.iterdir()] == ["rec.safetensors"]


def test_save_after_keep_graph_and_of_packed_sequences(tmp_path):
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)

    class Packed(nn.Module):
        def forward(self, x):
            return fastattn.varlen_attention(x, x, x, cu, cu)

    model = Packed()
    with record(model, keep_graph=True, pool=None, top_k=0) as rec:
        model(torch.randn(9, 2, 8, requires_grad=True))
    rec.save(tmp_path / "rec")
    back = fastattn.inspect.Record.load(tmp_path / "rec")
    assert [call.sequence for call in back] == [0, 1] and str(back) == str(rec)
    assert not back.calls[0].weights.requires_grad


def damaged(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-5], r"rec.safetensors is damaged, or no record: .*"),
        (lambda data: data[:100], r"rec.safetensors is damaged, or no record: .*"),
        (lambda data: b"", r"rec.safetensors is damaged, or no record: .*"),
        (lambda data: b"no such format" * 9, r"rec.safetensors is damaged, or no record: .*"),
        (
            lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
            r"rec.safetensors is damaged: the numbers of call \d's \w+ are not those saved",
        ),
        (
            lambda data: data.replace(b'\\"version\\"', b'\\"version,"', 1),
            r"rec.safetensors is damaged.*",
        ),
        (
            lambda data: data.replace(b'\\"version\\": 2', b'\\"version\\": 7', 1),
            "must be of version 2, got 7",
        ),
        (
            lambda data: data.replace(b'"0.entropy"', b'"0.other__"', 1),
            "is damaged: its header is not the one saved",
        ),
        (
            lambda data: data.replace(b'\\"calls\\"', b'\\"balls\\"', 1),
            "is damaged: its header is not the one saved",
        ),
        (lambda data: data.replace(b'\\"labels\\": [[', b'\\"labels\\": [7,', 1), "is damaged"),
    ],
)
def test_damaged_files(saved, change, message):
    _, path = saved
    damaged(path, change)
    with pytest.raises(ValueError, match=message):
        fastattn.inspect.Record.load(path)


def test_without_safetensors(saved, monkeypatch):
    rec, path = saved
    monkeypatch.setattr("fastattn.inspect.files.importlib.util.find_spec", lambda name: None)
    for action in (lambda: rec.save(path), lambda: fastattn.inspect.Record.load(path)):
        with pytest.raises(ModuleNotFoundError, match=r"need safetensors: pip install 'fastattn\[viz\]'"):
            action()


def test_other_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors must be a file that Record.save wrote, got other"):
        fastattn.inspect.Record.load(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors"):
        fastattn.inspect.Record.load(tmp_path / "nothing.safetensors")


def test_no_changed_bit_of_the_header_passes_unseen(tmp_path):
    layer, path = fastattn.nn.MultiheadAttention(8, 2, batch_first=True), tmp_path / "rec"
    with torch.no_grad(), record(layer, tokens=["键", "b", "c"], pool=3, top_k=2) as rec:
        layer(torch.randn(2, 3, 8))
    rec.save(path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for n in range(8, end):
        path.write_bytes(data[:n] + bytes([data[n] ^ (1 << n % 7)]) + data[n + 1 :])
        try:
            back = fastattn.inspect.Record.load(path)
        except ValueError:
            continue
        # What JSON reads alike, as a space for another.
        assert str(back) == str(rec) and back.labels == rec.labels and repr(back.calls) == repr(rec.calls)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts["calls"][0].update(first_query=-5), "call 0's positions must be >= 0, got -5"),
        (
            lambda facts: facts["calls"][0].update(sequence=-3),
            "call 0's positions must be >= 0, got 0 and -3",
        ),
        (lambda facts: facts["calls"][0].update(pool_mode="zzz"), "call 0 has the unknown pool_mode 'zzz'"),
        (lambda facts: facts["calls"][0].update(path=3), "'path' must be of type str"),
        (lambda facts: facts.update(calls="x"), "'calls' must be of type list"),
        (lambda facts: facts.update(missed={"x": "y"}), "'missed' must hold numbers of calls"),
        (lambda facts: facts.update(labels=[["*", [[1]], [["a"]]]]), "its labels are not as"),
        (lambda facts: facts.update(labels=[["*", [], []]]), "its labels are not as"),
        (lambda facts: facts.update(labels=[["*", "ab", "cd"]]), "its labels are not as"),
    ],
)
def test_facts_that_cannot_be(saved, change, message):
    """Of a file whose checksums are right."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from fastattn.inspect import files

    _, path = saved
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()[files._KEY])
    tensors = load_file(path)
    del facts["checksum"]
    change(facts)
    facts["checksum"] = files._header_checksum(facts, tensors)
    save_file(tensors, path, {files._KEY: json.dumps(facts)})
    with pytest.raises(ValueError, match=f"rec.safetensors is damaged: {message}"):
        fastattn.inspect.Record.load(path)


def test_saving_fails_kindly(saved, monkeypatch):
    rec, path = saved
    with pytest.raises(FileNotFoundError, match=r"must be in a folder that exists, got none named .*nowhere"):
        rec.save(path.parent / "nowhere" / "rec")
    with pytest.raises(IsADirectoryError, match="must be the name of a file, got a folder"):
        rec.save(path.parent)

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        rec.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["rec.safetensors"]


def test_files_are_as_open_as_others(saved):
    _, path = saved
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
