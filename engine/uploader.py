"""`python -m engine.uploader`: upload files to a repository on the hub, and say in lines of JSON how far it is.

The request comes over stdin: {"repo", "token", "private", "bytes": {name: base64 or null}, "paths": {name: path}}.
Replies: {"event": "creating" | "uploading"}, then {"event": "done", "url"} or {"event": "error", "text"}.
"""

from __future__ import annotations

import base64
import json
import sys

from pydantic import JsonValue


def explain(error: Exception) -> str:
    """One line about what went wrong; of the server's words only what can hold no token."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "This server is offline: nothing can be pushed. Download the zip instead."
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return explain(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        known = {
            401: "The hub does not accept the token. Paste one that has not expired, with write access.",
            403: "The token may not write there. Use one with write access, and a repository of yours.",
            404: "The hub knows no such place. Check the name before the slash.",
            409: "A repository of that name is in the way. Choose another name.",
            413: "The hub finds a file too large. Choose a smaller model.",
            429: "The hub has had too many requests. Try again in a few minutes.",
        }
        return known.get(status, f"The hub answered {status}. Try again in a few minutes.")
    if isinstance(error, OSError) or "TransportError" in [kind.__name__ for kind in type(error).__mro__]:
        return f"The hub cannot be reached ({type(error).__name__}). Check the network and try again."
    return f"The upload failed: {type(error).__name__}. Try again."


def main() -> None:
    """Do the request on stdin; replies are JSON lines on stdout."""
    request = json.loads(sys.stdin.read())

    def reply(event: str, **data: JsonValue) -> None:
        sys.stdout.write(json.dumps({"event": event, **data}) + "\n")
        sys.stdout.flush()

    try:
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=request["token"])
        reply("creating")
        api.create_repo(request["repo"], private=request["private"], exist_ok=True)
        reply("uploading")
        operations = [
            CommitOperationAdd(name, base64.b64decode(data) if data is not None else request["paths"][name])
            for name, data in request["bytes"].items()
        ]
        api.create_commit(request["repo"], operations, commit_message="Upload a model made smaller with Maquette")
        reply("done", url=f"{api.endpoint}/{request['repo']}")
    except Exception as error:  # the worker's edge: an exception's own text may quote a header
        reply("error", text=explain(error))


if __name__ == "__main__":
    main()
