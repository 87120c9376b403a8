"""The one error a user is meant to read. Imports nothing, so that every folder may import it."""


class UserError(Exception):
    """A setting, file or command of the user's that cannot work, said in one short paragraph.

    `setting` is what the user wrote or can change (`data.train`, `--nproc`), `got` its value as found,
    `expected` what would be accepted, and `remedy` what to do next. The command line prints `str(error)` and ends
    with exit code 2; the traceback shows only with `--debug`. It is no ValueError, so that nobody who expects one of
    bad data takes it for that.
    """

    def __init__(self, setting: str, got: object, expected: str, remedy: str) -> None:
        self.setting, self.got, self.expected, self.remedy = setting, got, expected, remedy
        super().__init__(setting, got, expected, remedy)

    def __str__(self) -> str:
        return f"{self.setting}: got {self.got}; expected {self.expected}. {self.remedy}"
