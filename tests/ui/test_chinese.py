"""Methods and messages in Chinese: none is forgotten when a method or an error is added."""

from __future__ import annotations

import ast
import os
import re
import typing
from collections.abc import Iterator
from errno import EIO, EMFILE, ENOENT, ENOSPC, ENOTDIR, EROFS, ESTALE
from pathlib import Path

import pytest

from engine.errors import InputError, MaquetteError, UnknownName, os_reason
from engine.methods import check, get, methods
from engine.origin import INDEX, SINGLE
from engine.recipes import load_recipe
from engine.records import Recipe
from engine.sources import WAYS
from engine.ways import PHRASES
from ui import chinese_fragments, chinese_messages, chinese_methods, language, markup, wording
from ui.chinese_documentation import DOCUMENTATION
from ui.edge import line
from ui.messages import Template, translate, translate_paragraph
from ui.words import ENGLISH

ENGINE = Path(__file__).parents[2] / "engine"
# What no page can show: the command line's own words, and what only our own mistakes raise.
LEFT = {
    "engine/cli.py", "engine/bitmask.py", "engine/generate.py", "engine/measure/latency.py", "engine/runtime/linear.py",
    "engine/runtime/native/decoder.py", "engine/runtime/native/linear.py", "engine/significance.py",
}  # fmt: skip


@pytest.mark.parametrize("name", methods())
def test_every_method_and_setting_has_chinese_words(name: str) -> None:
    method = get(name)
    assert method.title in chinese_methods.TITLES
    assert method.summary in chinese_methods.SUMMARIES
    for field, info in method.params.model_fields.items():
        assert info.description in chinese_methods.DESCRIPTIONS, f"{name}: {field}"
        assert field in chinese_methods.FIELDS, f"{name}: {field}"
        if typing.get_origin(info.annotation) is typing.Literal:
            words = {each for each in typing.get_args(info.annotation) if isinstance(each, str)}
            assert words <= chinese_methods.CHOICES.keys(), f"{name}: {field}"
    stem = Recipe.model_validate({"steps": [name]}).title().split(" ")[0]
    assert stem in chinese_methods.STEPS


def about(name: str) -> str:
    """What the Methods tab shows of a method's documentation beside its summary."""
    return get(name).documentation.partition("\n")[2]


def paragraphs(name: str) -> list[str]:
    found: list[str] = []
    markup.prose(about(name), lambda block: found.append(block) or block)
    return found


@pytest.mark.parametrize("name", methods())
def test_every_paragraph_about_a_method_has_chinese_words(name: str) -> None:
    for block in paragraphs(name):
        formula = block.startswith("    ")  # its words, if it has any, are found on the page
        assert " ".join(block.split()) in DOCUMENTATION or formula, block
    with language.use("zh-CN"):
        chinese = markup.prose(about(name), translate_paragraph)
    shape, code = r"<(?:p|pre|ul|ol|li|a [^>]*)>", r"<code>.*?</code>"
    assert re.findall(shape, chinese) == re.findall(shape, markup.prose(about(name)))  # with the same papers
    assert set(re.findall(code, markup.prose(about(name)))) <= set(re.findall(code, chinese))


def test_no_method_that_is_gone_is_still_translated() -> None:
    found = methods().values()
    assert DOCUMENTATION.keys() <= {" ".join(block.split()) for name in methods() for block in paragraphs(name)}
    assert {m.title for m in found} == chinese_methods.TITLES.keys()
    assert {m.summary for m in found} == chinese_methods.SUMMARIES.keys()
    fields = [(name, info.description) for m in found for name, info in m.params.model_fields.items()]
    assert {name for name, _ in fields} == chinese_methods.FIELDS.keys()
    assert {about for _, about in fields} == chinese_methods.DESCRIPTIONS.keys()


def templates() -> Iterator[tuple[str, str]]:
    """(file:line, sample) of every message that the engine raises, its values filled with samples."""
    kinds = {"ValueError", *(kind.__name__ for kind in subclasses(MaquetteError))} - {"UnknownName"}
    for file in sorted(ENGINE.rglob("*.py")):
        place = file.relative_to(ENGINE.parent).as_posix()
        if place in LEFT:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and node.args:
                samples = SAMPLES | BY_FILE.get(place, {})
                for sample in {filled(node.args[0], samples), filled(Otherwise().visit(node.args[0]), samples)}:
                    if sample is not None:  # pydantic names the setting before a validator's words
                        asked = node.func.id == "ValueError"
                        yield f"{place}:{node.lineno}", f"quantize/gptq: bits: {sample}, got 'x'." if asked else sample


class Otherwise(ast.NodeTransformer):
    """The same text, where every condition in it does not hold."""

    def visit_IfExp(self, node: ast.IfExp) -> ast.IfExp:
        return ast.IfExp(node.test, self.visit(node.orelse), self.visit(node.body))


def lines_of_the_log() -> Iterator[tuple[str, str]]:
    samples = {**SAMPLES, "note": "no token reached it", "error": "no token reached it", "about": "block 3"}
    samples |= {"unit": "influence", "kind": "width by taylor", "LABELS[axis]": "channels", "of_each": " in each block"}
    for file in sorted(ENGINE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            if node.func.attr == "log" and (sample := filled(node.args[0], samples)) is not None:
                yield f"{file.name}:{node.lineno}", sample


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(each) for each in kind.__subclasses__()))


# Values whose place says more than "some text": (expression, sample).
SAMPLES = {
    "method.name": "quantize/gptq", "self.name": "quantize/gptq", "earlier.name": "quantize/rtn",
    "later.name": "quantize/gptq", "where": "bits", "message": "Input should be a valid integer", "got": ", got 'x'",
    "reason": "experts are stored without zero points.", "axis": "heads", "label": "feed-forward neurons",
    "body.fixed[axis]": "this stablelm has a norm for each head", "what": "a cache of its own",
    "problem[:-5]": "missing", "run.status": "running", "why": "weights are not finite",
    "kept": "No checkpoint was written yet.", "_where(error)": "unreadable in line 1, column 2",
    "problem": "lm_head is missing", "error.strerror": "Permission denied", "UNITS[self.unit]": "MiB",
    "problem['msg']": "Input should be a valid number", "WAYS": WAYS, "SINGLE": SINGLE, "INDEX": INDEX,
    "called": "training text",
}  # fmt: skip
BY_FILE = {
    "engine/export/_gguf_families.py": {"unknown": "a single expert"},
    "engine/tokens.py": {"reason": "it has 5 tokens, the model 7"},
    "engine/checkpoint.py": {"problem": "the weights do not fit the config (missing: lm_head)"},
    "engine/suitability.py": {"error": "all 8 blocks would be removed. Keep one at least: count 7 or less."},
    "engine/ranks.py": {"'s' * (gpus != 1)": "s"},
    "engine/repos.py": {"why": "too many requests"},
    "engine/wire.py": {"_reason(error)": "Connection refused"},
    "engine/worker.py": {
        "error": "a/b is gated: accept its conditions at huggingface.co/a/b and give a token of that account."
    },
}


def filled(node: ast.expr, samples: dict[str, str]) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part(each, samples) for each in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return f"{filled(node.left, samples) or 'x'}{filled(node.right, samples) or 'x'}"
    if isinstance(node, ast.IfExp):
        return filled(node.body, samples)
    return None  # passed on: what another place has said


def part(node: ast.expr, samples: dict[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.FormattedValue)
    if isinstance(node.value, ast.IfExp):  # ' or leave them' if ... else ''
        found = filled(node.value.body, samples)
        return "7" if found is None else found
    return samples.get(ast.unparse(node.value), "7")


def test_every_error_of_the_engine_can_be_said_in_chinese() -> None:
    with language.use("zh-CN"):
        missing = [f"{place}: {sample}" for place, sample in templates() if translate(sample) == sample]
    assert missing == []


def test_what_is_said_in_other_ways_can_be_said_in_chinese() -> None:
    """Reasons that are returned, or come from a process of our own: no `raise` holds their text."""
    codes = (ENOSPC, EROFS, EMFILE, EIO, ENOENT, ENOTDIR, ESTALE)
    said = [os_reason(OSError(code, os.strerror(code), name)) for code in codes for name in (None, "/x/events.log")]
    said += [f"The worker could not be started. {reason}" for reason in said]
    for name, phrase in PHRASES.items():
        assert name in {key.removeprefix("way.") for key in ENGLISH}
        said.append(f"The run needs 9.1 GiB, 7.8 are free: {phrase} 5.2.")
        said.append(f"{said[-1]} That is still too much. Close other programs, or choose a smaller model.")
    said.append("The run needs 9.1 GiB, 7.8 are free. Close other programs, or choose a smaller model.")
    said += [f"There is no {each} 'a'. Give `demo` or a text or JSONL file." for each in ("calibration file", "text")]
    for file in ("uploader.py", "quotas.py", "download.py", "fetch.py", "supervision.py", "worker.py", "streams.py"):
        said += sentences(file)
    said += [f"The hub answers too slowly. Try again later. {then}" for then in ("Trying again.", "Going on in 8 s.")]
    with language.use("zh-CN"):
        assert [text for text in said if translate(text) == text] == []
    assert len(said) > 60


def sentences(file: str) -> Iterator[str]:
    """Every text of a file that ends as a sentence and is no docstring."""
    tree = ast.parse((ENGINE / file).read_text())
    samples = (
        SAMPLES | BY_FILE.get(f"engine/{file}", {}) | {"short(error, 300)": "The hub's answer broke off. Try again."}
    )
    samples |= {"error": "The hub's answer broke off. Try again."} if file == "fetch.py" else {}
    samples |= {"how": " (SIGKILL)"}
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            inner |= {node.value}
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.JoinedStr) or called.startswith(("log.", "argparse.")):
            inner |= {*ast.walk(node)} - {node}
        if node in inner or not isinstance(node, ast.JoinedStr | ast.Constant):
            continue
        text = filled(node, samples) or ""
        if re.fullmatch(r"[A-Z'].* .*\.", text):
            yield text


def test_every_line_of_a_log_can_be_said_in_chinese() -> None:
    with language.use("zh-CN"):
        missing = [f"{place}: {line_}" for place, line_ in lines_of_the_log() if translate(line_) == line_]
    assert missing == []


def test_every_kind_of_unknown_name_has_a_word() -> None:
    source = "\n".join(file.read_text() for file in ENGINE.rglob("*.py"))
    kinds = set(re.findall(r'(?:UnknownName|_known)\(\s*"([^"]+)"', source))
    assert len(kinds) > 4
    assert kinds <= chinese_fragments.FRAGMENTS.keys()


def test_both_sides_of_a_message_carry_the_same_values() -> None:
    for texts in (chinese_messages.MESSAGES, chinese_fragments.FRAGMENTS):
        for text, translation in texts.items():
            assert sorted(Template.of(text).names) == sorted(Template.of(translation).names), text
            assert re.search("[\u4e00-\u9fff]", translation) or len(Template.of(text).names) >= 2, text


@pytest.mark.parametrize(
    ("yaml", "chinese"),
    [
        ("steps: [{quantize/gptk: {}}]", "未知的方法“quantize/gptk”。您是不是指 quantize/gptq 或 "),
        ("steps: [{quantize/gptq: {bits: 99}}]", "quantize/gptq：bits：应为 2, 3, 4, 5, 6, 7 或 8，收到的是 99。"),
        ("steps: [{quantize/gptq: {damping: x}}]", "quantize/gptq：damping：应为数字，收到的是 'x'。"),
        ("steps: [{quantize/gptq: {samples: 0}}]", "quantize/gptq：samples：应大于或等于 1，收到的是 0。"),
        ("steps: [{quantize/gptq: {bitz: 4}}]", "未知的quantize/gptq 设置“bitz”"),
        ("seed: -1", "seed：应大于或等于 0，收到的是 -1。"),
        ("models: demo", "未知的键“models”。您是不是指 model？可用："),
        ("[", "配方不是有效的 YAML：第 1 行第 2 列："),
        ("- a", "配方必须是 `model: demo` 这样的映射"),
        ("steps: 3", "steps 必须是 `- quantize/rtn: {bits: 4}` 这样的列表。"),
        ("steps: [quantize/gptq, quantize/rtn]", "quantize/rtn 不能排在 quantize/gptq 之后"),
        ("measure: [speed]", "未知的测量项“speed”。"),
    ],
)
def test_what_a_visitor_does_wrong_is_said_in_chinese(yaml: str, chinese: str) -> None:
    with pytest.raises(InputError) as error:
        check(load_recipe(yaml))
    with language.use("zh-CN"):
        assert chinese in line(error.value)
    assert line(error.value) == str(error.value)


def test_a_line_that_nobody_knows_and_a_hostile_one_stay_as_they_are() -> None:
    with language.use("zh-CN"):
        for text in (
            "",
            "Nobody has said this before.",
            "Unknown {said}",
            "a: b" * 5000,
            ": , got " * 200,
            "{0}{said}",
        ):
            assert translate(text) == text
        name = str(UnknownName("method", "<b>{said}</b>", ["quantize/rtn"]))
        assert translate(name) == "未知的方法“<b>{said}</b>”。可用：quantize/rtn。"


def test_two_notes_on_a_linear_are_both_said() -> None:
    with language.use("zh-CN"):
        assert translate("damping raised from 0.01 to 0.1; only 12 tokens reached it") == (
            "阻尼从 0.01 提高到 0.1；只有 12 个词元到达它"
        )


def test_recipes_are_named_in_chinese() -> None:
    steps = [
        {"prune/depth": {"share": 0.25}},
        {"distill/logits": {"keep_every": 2}},
        {"quantize/mixed": {"budget": 3.25}},
    ]
    with language.use("zh-CN"):
        assert wording.title(Recipe.model_validate({"steps": steps})) == (
            "深度剪枝 25% 的层 → Logit 蒸馏 1/2 层 → 混合位宽 3.25 位"
        )
        assert wording.title(Recipe()) == "原始模型"
    assert wording.title(Recipe()) == "original"
