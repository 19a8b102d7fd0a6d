"""Chat templates, rendered where they can be stopped: `python -m engine.chat`, one request, one process.

A template is a program of the model's author. The sandbox of `transformers` keeps it from the machine, not from
running for ever or filling the memory. So it runs in a process that holds nothing, with limits on its time and memory;
what it writes is cut off at a size. The request comes over stdin and the text goes to stdout, both as JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping

from pydantic import JsonValue

from engine.errors import BadModel, BadText, short

SECONDS = 10.0  # to start and to render; measured: 0.9 s of starting, 2 ms of rendering
MEMORY = 1 << 30  # bytes of data that the process may hold
LONGEST = 60_000  # characters of a rendered prompt
LARGEST_TEMPLATE = 200_000  # characters

Body = dict[str, JsonValue]


def render(template: str | None, system: str, prompt: str, special: Mapping[str, str]) -> str:
    """The text that a model reads when a user says `prompt`, up to where the answer begins.

    template: Jinja, as in tokenizer_config.json or chat_template.jinja. special: the special tokens that it may name.

    Raises:
        BadModel: there is no template, or it does not come to an end in time and size.
        BadText: the template refuses these messages, as some refuse a system prompt.
    """
    if not template:
        raise BadModel("This model has no chat template: it was made to go on with a text. Choose plain text.")
    if len(template) > LARGEST_TEMPLATE:
        raise BadModel(
            f"The chat template has {len(template):,} characters; {LARGEST_TEMPLATE:,} are read. Use plain text."
        )
    messages: list[JsonValue] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    request = json.dumps({"template": template, "messages": messages, "special": dict(special)})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "engine.chat"], input=request, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise BadModel(f"The chat template did not end within {SECONDS:.0f} s. Choose plain text.") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:  # the kernel or the memory limit has ended it
        raise BadModel("The chat template needs too much memory or time. Choose plain text.") from None
    if "error" in answer:
        raise BadText(f"The chat template refuses this: {short(answer['error'], 200)}")
    text = str(answer["text"])
    if len(text) > LONGEST:
        raise BadModel(
            f"The chat template writes more than the {LONGEST:,} characters that are read. Choose plain text."
        )
    return text


def main() -> None:
    """Render the request on stdin under limits that the kernel enforces."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS), int(SECONDS)))
    request = json.loads(sys.stdin.read())
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        found = render_jinja_template(  # typed as a text, but it gives texts and places
            [request["messages"]], chat_template=request["template"], add_generation_prompt=True, **request["special"]
        )
        answer: Body = {"text": found[0][0][: LONGEST + 1]}
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        answer = {"error": " ".join(str(error).split()) or type(error).__name__}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
