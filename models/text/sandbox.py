"""A separate process that renders one chat template. Started by `template.py` as a script; never imported by the package.

    python -I -S sandbox.py FOLDER_OF_MINIJINJA   < request.json   > answer.json

A template comes with a model file and is not to be trusted. Fuel bounds how many instructions it runs, but ten of them are
enough to double a string into gigabytes, and no template engine bounds that. So the process first gives away its rights:
half a second of processor time, `limit_bytes` of address space, no files to write. What it may call is listed in `render`.
Knows nothing of models and imports nothing of the package.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
from typing import Any

CPU_S = 0.5


def give_up_rights(limit_bytes: int) -> None:
    """Let the kernel end this process when it wants too much; without such limits, fuel and time-out remain."""
    try:
        import resource
        import signal
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, CPU_S)  # SIGPROF, unhandled, ends the process


class Refused(Exception):
    """The template itself refused the conversation."""


def refuse(message: object) -> None:
    """`raise_exception` of the templates."""
    raise Refused(str(message))


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """`tojson` as Hugging Face's templates expect it: neither ASCII nor HTML escapes."""
    pair = tuple(separators) if separators is not None else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def is_iterable(value: object) -> bool:
    """`is iterable`. minijinja calls None iterable, Jinja does not, and templates ask before they count `tools`."""
    return isinstance(value, str | list | tuple | dict)


def format_now(pattern: str) -> str:
    """`strftime_now` of the templates: local time."""
    return dt.datetime.now().strftime(pattern)


def render(request: dict[str, Any]) -> dict[str, str]:
    """The answer to one request: `{"text"}`, or `{"refused"}` in the template's words, or `{"failed"}` in the engine's."""
    import minijinja

    environment = minijinja.Environment(fuel=request["fuel"], trim_blocks=True, lstrip_blocks=True, debug=False)
    environment.add_filter("tojson", to_json)
    environment.add_test("iterable", is_iterable)
    environment.add_global("raise_exception", refuse)
    environment.add_global("strftime_now", format_now)
    try:
        text = environment.render_str(request["template"], "chat_template", **request["context"])
    except Refused as error:
        return {"refused": str(error)[:1000]}
    except minijinja.TemplateError as error:
        place = f" (line {error.line})" if error.line else ""
        return {"failed": f"{error.detail or error.message}{place}"[:1000]}
    except (TypeError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        return {"failed": f"{type(error).__name__}: {error}"[:1000]}
    if len(text) > request["limit_characters"]:
        return {"failed": f"{len(text)} characters of output, at most {request['limit_characters']} allowed"}
    return {"text": text}


def main() -> None:
    """Read a request, answer it."""
    request = json.loads(sys.stdin.buffer.read())
    sys.path.append(sys.argv[1])
    import minijinja  # noqa: F401  before the limits: loading it must not count against the template

    give_up_rights(request["limit_bytes"])
    sys.stdout.buffer.write(json.dumps(render(request)).encode())


if __name__ == "__main__":
    main()
