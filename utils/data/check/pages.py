"""A page per data set: images with their masks, and conversations in which what is learned stands out."""

import numpy as np

from model.image_processing_pixellm import open_image
from model.overlay import draw_overlay
from model.processing_pixellm import PixelLMProcessor
from utils.data.check.examine import describe_error
from utils.data.check.survey import spread_evenly
from utils.data.readers.base import Reader
from utils.data.samples import NO_IMAGE, Conversation, Sample
from utils.drawing.pages import Article, Figure, Paragraph, Piece, Section, embed_image, render_page

LEGEND = Paragraph([Piece("What is "), Piece("learned", style="learned"), Piece(" stands out from the prompt.")])


def sample_page(title: str, reader: Reader, count: int, processor: PixelLMProcessor | None = None) -> str:
    """HTML with `count` samples as training draws them; one that cannot be read says why.

    processor: conversations are shown as it writes them out; None: in plain words.
    """
    chosen = spread_evenly(len(reader), count) if len(reader) else ()
    return render_page(title, [Section([_make_article(reader, index, processor) for index in chosen])], LEGEND)


def _make_article(reader: Reader, index: int, processor: PixelLMProcessor | None) -> Article:
    try:
        sample = reader.read(index, np.random.default_rng(index))
        figures = [] if sample.image_path == NO_IMAGE else [_draw(sample, one) for one in sample.conversations]
        texts = [_write_out(one, sample, processor) for one in sample.conversations]
    except Exception as error:
        reason = describe_error(error)
        if reason is None:
            raise
        return Article(before=[Paragraph.plain(": ".join(reason))])
    return Article(before=[Paragraph.plain("", sample.sample_id)], figures=figures, after=texts)


def _draw(sample: Sample, conversation: Conversation) -> Figure:
    image = open_image(sample.image_path)
    targets = [target for turn in conversation for target in turn.targets]
    masks = [target.decode() == 1 for target in targets]
    stacked = np.array(masks, dtype=bool).reshape(len(masks), *image.shape[:2])
    overlay = draw_overlay(image, stacked, [target.name for target in targets])
    return Figure(", ".join(target.name for target in targets) or "no target", embed_image(overlay))


def _write_out(conversation: Conversation, sample: Sample, processor: PixelLMProcessor | None) -> Paragraph:
    if processor is None:
        pieces = [
            part for turn in conversation for part in ((f"Q: {turn.question}\nA: ", False), (f"{turn.answer}\n", True))
        ]
    else:
        turns = [(turn.question, turn.answer) for turn in conversation]
        encoded = processor.encode_conversation(turns, with_image=sample.image_path != NO_IMAGE)
        pieces = processor.conversation_pieces(encoded)
    return Paragraph([Piece(text, style="learned" if learned else "prompt") for text, learned in pieces])
