"""A reward by program: the shorter a completion, the better. The signature is TRL's."""


def brief(completions: list, completion_ids: list, **columns: object) -> list[float]:
    """One reward a completion: minus its length in tokens."""
    return [-float(len(ids)) for ids in completion_ids]
