"""How near free text is to its references, by a maintained library."""

from collections.abc import Sequence


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    """Corpus BLEU in [0, 100] as sacrebleu computes it with its own settings, case counting; None without answers.

    references: those of each answer, at least one and as many as there are.
    """
    from sacrebleu.metrics import BLEU

    if not answers:
        return None
    most = max(len(one) for one in references)
    columns = [[one[column] if column < len(one) else "" for one in references] for column in range(most)]
    return float(BLEU().corpus_score(list(answers), columns).score)
