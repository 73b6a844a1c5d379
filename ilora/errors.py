"""The error for what a user can correct."""


class UserError(ValueError):
    """Something that the user can correct; the message is one sentence: what is wrong, where, what to do next."""

    def _render_traceback_(self) -> list[str]:
        """What IPython and papermill show: the sentence alone, no stack."""
        return [f"{type(self).__name__}: {self}"]
