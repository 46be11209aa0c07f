"""`photographs`: the two photographs of scikit-learn, 640 x 427 pixels each, with captions."""

from transfusion.data.raw import RawDocument, RawImage, RawText

PHOTOGRAPHS = {  # by danielbuechele and by vultilion on Flickr, under CC BY 2.0
    "train": ("china.jpg", "a chinese temple above a lake"),
    "heldout": ("flower.jpg", "an orange flower"),
}


class Photographs:
    """One caption-image pair in each split. It is enough to test a codec on real photographs, whole or cropped."""

    name = "photographs"

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_sample_image

        file, caption = PHOTOGRAPHS[split]
        self.documents = (RawDocument((RawText(caption), RawImage(load_sample_image(file))), pairs=True),)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, id: int) -> RawDocument:
        return self.documents[id]
