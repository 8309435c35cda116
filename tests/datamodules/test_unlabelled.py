import numpy as np
import pytest
import torch

from glai_lightning.datamodules import UnlabelledDataModule


def batches(path, **options):
    data = UnlabelledDataModule(path, batch_size=2, **options)
    data.setup("predict")
    return data, list(data.predict_dataloader())


def test_rows_come_in_their_order_and_are_named_by_number(tmp_path):
    np.savez(tmp_path / "rows.npz", x=np.arange(15.0).reshape(5, 3))
    data, found = batches(tmp_path / "rows.npz")
    assert [len(batch) for batch in found] == [2, 2, 1]
    assert torch.cat(found).flatten().tolist() == list(range(15))
    assert (data.names, data.num_features) == (list(range(5)), 3)


def test_texts_are_read_by_the_name_of_their_column(tmp_path):
    (tmp_path / "texts.csv").write_text('id,review\n7,good\n8,"bad, really"\n9,fine\n')
    data, found = batches(tmp_path / "texts.csv", text_column="review")
    assert found == [[["good", "bad, really"]], [["fine"]]]
    assert data.num_features is None


def test_images_of_a_folder_are_named_by_their_path_and_transformed(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "b").mkdir()
    for name, mode in (("b/2.png", "L"), ("1.jpg", "RGB"), ("3.png", "RGBA")):
        image.new(mode, (8, 6)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    data, found = batches(tmp_path, transform=lambda picture: picture.resize((4, 4)))
    assert data.names == ["1.jpg", "3.png", "b/2.png"]
    assert [batch.shape for batch in found] == [(2, 3, 4, 4), (1, 3, 4, 4)]


@pytest.mark.parametrize("text", ["", "a,b\n", "a,b\n1,2\n3\n", "a,b\n1,nan\n", "a,b\n1,x\n"])
def test_a_table_that_is_none_is_named(tmp_path, text):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=r"Expected .*rows.csv"):
        batches(tmp_path / "rows.csv")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Expected inputs in .* but got none"):
        batches(tmp_path)
