"""The torch backend: the same model definitions on any torch device."""
