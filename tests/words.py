"""A text encoder for tests, that needs no weights."""
import torch

from diffusion_papers.topics.text import TextEncoder, TextStates


class Words(TextEncoder):
    "A token a word, whose state is the number of its letters."
    name, width, longest, pooling = "words", 1, 30, "mean"

    def encode(self, captions):
        there = torch.arange(max(len(text.split()) for text in captions)) < torch.tensor([len(text.split()) for text in captions])[:, None]
        rows = [[float(len(word)) for word in text.split()] + [0.0] * (there.shape[1] - len(text.split())) for text in captions]
        return TextStates(torch.tensor(rows)[..., None], there)

    def spans(self, caption):
        found, start = [], 0
        for word in caption.split():
            start = caption.index(word, start)
            found.append((start, start + len(word)))
            start += len(word)
        return found
