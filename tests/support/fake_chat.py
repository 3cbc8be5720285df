"""A program for terminal tests: `offload chat` over a fake engine. Arguments: answer, seconds per token, failure or ''."""

import sys

from support.fake_engine import FakeEngine

from offload.cli.chat import run_chat
from offload.cli.chat_input import is_interactive
from offload.cli.chat_state import Conversation
from offload.errors import ClosedError, ContextError

if __name__ == "__main__":
    answer, token_s, failure = sys.argv[1:]
    failures = {
        "context": ContextError("prompt has 9000 tokens, ctx is 4096", needed_tokens=9000, available_tokens=4096),
        "closed": ClosedError("the engine is closed; load it again"),
    }
    engine = FakeEngine(answer, token_s=float(token_s), failure=failures.get(failure), failure_at=2)
    try:
        run_chat(engine, Conversation(), interactive=is_interactive())  # type: ignore[arg-type]
    except ClosedError as error:
        sys.exit(f"offload: error: {error}")
    print(f"asked {[prompt[-1]['content'] for prompt in engine.prompts]}")
