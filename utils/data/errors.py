"""What is wrong with data, in one sentence."""

from model.structures import PixelLMError

_UNUSABLE = "unusable annotation"

NO_SUCH_SPLIT = "split that does not exist"
"""Cause where a data set is asked for a split it does not have."""

EMPTY_CLASS_LIST = "empty class list"
"""Cause where a file of classes names none."""


class DataError(PixelLMError):
    """A file, an annotation or a setting of the data cannot be used.

    The message is one sentence for a person: what was found and where, what was expected, what to do. `cause` names the
    kind of trouble in a few words, the same for every sample that has it, so that such samples can be counted.
    """

    def __init__(self, message: str, cause: str = _UNUSABLE) -> None:
        super().__init__(message)
        self.cause = cause


def without_traceback(error: DataError) -> DataError:
    """`error` as it was raised: DataLoader puts the traceback of a worker process in front of its sentence."""
    _, raised_there, sentence = str(error).rpartition(f"{DataError.__name__}: ")
    return DataError(sentence.strip(), error.cause) if raised_there else error
