"""The page's edge: who is asking, and what they read when something goes wrong.

A visitor is the name in our cookie, which the door (`ui.guard`) has proved and put there; where a browser keeps
no cookies it is the Gradio session. It is never empty: the empty owner is the command line.
"""

from __future__ import annotations

import functools
import inspect
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing

import gradio as gr
from gradio.context import LocalContext
from markupsafe import escape
from pydantic import ValidationError

from engine.errors import MaquetteError
from ui import language
from ui.messages import translate
from ui.visitors import COOKIE, NAME
from ui.wording import say

log = logging.getLogger(__name__)

__all__ = ["COOKIE", "NAME", "edge", "has_cookie", "line", "tell", "visitor"]


def visitor(request: gr.Request) -> str:
    """The owner under which a request acts.

    Raises:
        MaquetteError: neither a cookie nor a session came with the request.
    """
    cookie = str((request.cookies or {}).get(COOKIE, ""))
    if NAME.fullmatch(cookie):
        return cookie
    if request.session_hash:
        return f"session-{request.session_hash[:60]}"
    raise MaquetteError(say("error.no_visitor"))


def has_cookie(request: gr.Request) -> bool:
    """Whether the browser keeps our cookie; without it a reload would be a new visitor."""
    return bool(NAME.fullmatch((request.cookies or {}).get(COOKIE, "")))


def line(error: Exception) -> str:
    """What a visitor reads of an error; what nobody foresaw is logged under a number they can quote."""
    if isinstance(error, MaquetteError):
        return translate(str(error))
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return translate(f"{'.'.join(str(part) for part in problem['loc']) or 'recipe'}: {problem['msg']}.")
    number = secrets.token_hex(3)
    log.error("unforeseen error %s", number, exc_info=error)
    return say("error.unforeseen", number=number)


def tell(error: Exception) -> None:
    """Show an error as one line in a corner of the page."""
    gr.Warning(str(escape(line(error))), title=say("error.title"), duration=12)


def edge(handler: Callable[..., object]) -> Callable[..., object]:
    """A handler in its visitor's language whose errors become one line in a corner; its outputs stay as they are."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stream(*args: object, **kwargs: object) -> Iterator[object]:
            code = spoken()
            with closing(handler(*args, **kwargs)) as steps:
                while True:  # each step may run in another context
                    with language.use(code):
                        try:
                            value = next(steps)
                        except StopIteration:
                            return
                        except Exception as error:
                            tell(error)
                            value = gr.skip()
                    yield value

        return stream

    @functools.wraps(handler)
    def call(*args: object, **kwargs: object) -> object:
        with language.use(spoken()):
            try:
                return handler(*args, **kwargs)
            except Exception as error:
                tell(error)
                return gr.skip()

    return call


def spoken() -> str:
    """The language of the request that Gradio serves; outside of one, what is spoken already."""
    request = LocalContext.request.get(None)
    return language.current() if request is None else language.of_request(request)
