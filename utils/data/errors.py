"""What is wrong with data, in one sentence."""


class DataError(ValueError):
    """A file, an annotation or a setting of the data cannot be used.

    The message is one sentence for a person: what was found and where, what was expected, what to do.
    """

    user_message = True
