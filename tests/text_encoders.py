"""Text encoders of the real libraries, small and of random weights, in folders: nothing is downloaded."""

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "very", "film", "."]


def write_encoder(folder):
    """Write a BERT of 16 numbers and 12 tokens, for transformers."""
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, **sizes)
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def write_sentence_encoder(folder, encoder):
    """Write the encoder of a folder with pooling and normalisation, for sentence-transformers."""
    from sentence_transformers import SentenceTransformer, models

    modules = [models.Transformer(str(encoder), max_seq_length=12), models.Pooling(16), models.Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder
