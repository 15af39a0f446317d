"""A reward function with TRL's signature: the shorter a completion, the higher its reward."""


def brief(completions: list, completion_ids: list, **columns: object) -> list[float]:
    """One reward per completion: minus its length in tokens."""
    return [-float(len(ids)) for ids in completion_ids]
