import sys

import pytest

from offload.cli import start


class Interrupting:
    """Presses Ctrl-C while the command's main module is looked for."""

    def find_spec(self, name, path=None, target=None):
        if name == "offload.cli.main":
            raise KeyboardInterrupt


def test_an_interrupt_while_modules_load_is_an_interrupt(monkeypatch):
    monkeypatch.delitem(sys.modules, "offload.cli.main", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        start()
    assert ended.value.code == 130
