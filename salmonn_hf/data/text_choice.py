"""Which text of a row is trained on, where a clip has several, such as five captions."""


def row_texts(row: dict) -> list[str]:
    """The texts of a row's clip that are not empty."""
    texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def most_typical(texts: list[list]) -> int:
    """Which of some texts, lists of words or token ids, has most in common with the others: by F1 of their sets."""
    bags = [set(text) for text in texts]
    shared = [sum(2 * len(bag & other) / (len(bag) + len(other)) for other in bags) for bag in bags]
    return max(range(len(bags)), key=shared.__getitem__)
