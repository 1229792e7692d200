"""Files of one stem: each is itself, whichever was imported first; where a name can only be one, it is said."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graphopt.data import Samples
from graphopt.errors import UsageError
from graphopt.loading.functions import resolve_function
from graphopt.loading.model_file import load_model
from graphopt.loading.python_files import import_file
from graphopt.measure.evaluate import evaluator


@pytest.fixture(autouse=True)
def modules_as_before() -> Iterator[None]:
    """Forget what a test imports, and see that it leaves no directory to search."""
    before, paths = set(sys.modules), list(sys.path)
    yield
    assert sys.path == paths
    for name in set(sys.modules) - before:
        if name.startswith(("graphopt_plugin_", "sibling", "mine")):
            del sys.modules[name]


def two(folder: Path, name: str, text: str) -> tuple[Path, Path]:
    """Write a file of one name into two folders; VALUE in it is the folder's name."""
    files = folder / "a" / name, folder / "b" / name
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text.replace("VALUE", repr(file.parent.name)))
    return files


CLASSES = """
from __future__ import annotations
from dataclasses import dataclass

Text = str

@dataclass(frozen=True, slots=True)
class Options:
    word: Text = VALUE
"""


def test_files_of_one_stem_are_two_modules(tmp_path: Path) -> None:
    one, other = map(import_file, two(tmp_path, "mine.py", CLASSES))
    for module, word in ((one, "a"), (other, "b")):
        assert module.Options().word == word
        assert sys.modules[module.__name__] is module
        assert typing.get_type_hints(module.Options) == {"word": str}
        assert pickle.loads(pickle.dumps(module.Options("x"))) == module.Options("x")
        assert dataclasses.fields(module.Options)[0].default == word
        assert f"word: Text = {word!r}" in inspect.getsource(module.Options)


def test_a_file_is_one_module_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = two(tmp_path, "mine.py", CLASSES)
    (tmp_path / "link.py").symlink_to(file)
    monkeypatch.chdir(file.parent)
    found = [import_file(path) for path in (file, Path("mine.py"), Path("../b/../a/mine.py"))]
    assert all(module is found[0] for module in found)


def test_an_edited_file_is_read_again_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CLASSES.replace("VALUE", "'a'"))
    old = import_file(file)
    file.write_text(CLASSES.replace("VALUE", "'b'"))  # in the same second, of the same size
    assert import_file(file).Options().word == "b"
    assert pickle.loads(pickle.dumps(old.Options())).word == "a"
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize("name", ["my-pass.py", "my.pass.py", "1st.py"])
def test_names_that_are_no_identifiers(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(CLASSES.replace("VALUE", "'a'"))
    module = import_file(tmp_path / name)
    assert pickle.loads(pickle.dumps(module.Options())) == module.Options()


def test_a_file_that_raises_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt")
    before = set(sys.modules)
    with pytest.raises(KeyboardInterrupt):
        import_file(tmp_path / "mine.py")
    assert set(sys.modules) == before


def test_a_module_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "sibling_one.py").write_text("word = 'beside'")
    (tmp_path / "sibling_pack").mkdir()
    (tmp_path / "sibling_pack" / "__init__.py").write_text("from sibling_pack.inner import word")
    (tmp_path / "sibling_pack" / "inner.py").write_text("word = 'inside'")
    (tmp_path / "mine.py").write_text("import sibling_one\nfrom sibling_pack import word\n")
    module = import_file(tmp_path / "mine.py")
    assert (module.sibling_one.word, module.word) == ("beside", "inside")


@pytest.mark.parametrize(
    "text", ["import sibling", "from sibling import word", "def later():\n    from sibling import word"]
)
def test_two_modules_of_one_name_beside_two_files(text: str, tmp_path: Path) -> None:
    one, other = two(tmp_path, "sibling.py", "word = VALUE")
    first, second = two(tmp_path, "mine.py", text)
    first.write_text("import sibling")
    import_file(first)
    with pytest.raises(UsageError) as caught:
        import_file(second)
    assert str(caught.value) == (
        f"`sibling` is {one} in this process, and {other} would be it too: a name is imported once. Rename one of them."
    )
    assert len([name for name in sys.modules if name.startswith("graphopt_plugin_mine")]) == 1


def test_two_modules_of_one_name_beside_two_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two(tmp_path, "sibling.py", "word = VALUE")
    for folder in "ab":
        (tmp_path / folder / f"sibling_{folder}.py").write_text("import sibling")
        (tmp_path / folder / f"mine_{folder}.py").write_text(f"import sibling_{folder}\ndef data():\n    return 1\n")
    import_file(tmp_path / "a" / "mine_a.py")
    monkeypatch.chdir(tmp_path / "b")
    refusals = (lambda: import_file(Path("mine_b.py")), lambda: resolve_function("mine_b:data", "--data"))
    for refused in refusals:
        with pytest.raises(UsageError, match=f"`sibling` is {one} in this process, and {other} would be it too"):
            refused()


def test_files_that_import_each_other(tmp_path: Path) -> None:
    (tmp_path / "sibling.py").write_text("import sibling_two\nword = 1")
    (tmp_path / "sibling_two.py").write_text("import sibling")
    (tmp_path / "mine.py").write_text("from sibling import word")
    assert import_file(tmp_path / "mine.py").word == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("class Stop(BaseException): pass\nraise Stop", "Stop"),
        ("class Stop(KeyboardInterrupt): pass\nraise Stop", "Stop"),
        ("raise ValueError('one\\ntwo\\x1b[2J')", "ValueError: one"),
    ],
)
def test_a_file_that_ends_the_process(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(f"x = 1\n{text}")
    line = len(text.splitlines()) + 1
    with pytest.raises(UsageError) as caught:
        import_file(tmp_path / "mine.py")
    place = tmp_path / "mine.py"
    assert str(caught.value) == f"The plugin {place} cannot be imported: {said} ({place}:{line})."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"importing `mine` failed .{said}.; the current directory"):
        resolve_function("mine:build", "--factory")


def test_a_module_of_the_standard_library_is_that_whatever_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "dataclasses.py").write_text("raise ValueError")
    (tmp_path / "mine.py").write_text("import dataclasses, json\nasdict = dataclasses.asdict")
    assert import_file(tmp_path / "mine.py").asdict is dataclasses.asdict


FUNCTIONS = """
import numpy, torch
def build():
    return torch.nn.Linear(3, ord(VALUE))
def data():
    return numpy.zeros((2, 3), numpy.float32)
def score(model):
    return 1.0
"""


def test_functions_in_two_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two(tmp_path, "mine.py", FUNCTIONS)
    monkeypatch.chdir(one.parent)
    assert load_model(factory="mine:build").model.out_features == ord("a")
    assert resolve_function("mine:score", "--eval")(None) == 1.0
    monkeypatch.chdir(other.parent)
    refusals = (
        lambda: load_model(factory="mine:build"),
        lambda: evaluator("mine:score"),
        lambda: Samples.open("mine:data", ["x"]),
        lambda: resolve_function("mine:score", "--eval"),
    )
    for refused in refusals:
        with pytest.raises(UsageError, match=f"`mine` is {one} in this process, and {other} would be it too"):
            refused()


def test_a_trusted_pickle_of_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two(tmp_path, "mine.py", "import torch\nclass Net(torch.nn.Linear):\n    word = VALUE\n")
    monkeypatch.chdir(one.parent)
    net = resolve_function("mine:Net", "--factory")(2, 2)
    torch.save(net, tmp_path / "net.pt")
    assert load_model(tmp_path / "net.pt", trust=True).model.word == "a"
    monkeypatch.chdir(other.parent)
    with pytest.raises(UsageError, match=f"`mine` is {one} in this process, and {other} would be it too"):
        load_model(tmp_path / "net.pt", trust=True)


def test_a_name_that_python_has_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "statistics.py").write_text("def mean(model):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    import statistics  # noqa: F401 - so that it is imported

    with pytest.raises(UsageError, match=r"`statistics` is .*/lib.*, and .*/statistics.py would be it too"):
        resolve_function("statistics:mean", "--eval")
