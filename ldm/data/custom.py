"""One's own pictures without captions, listed in a text file, as configs of `taming.data.custom` name them."""

from ldm.data.lsun import LSUNBase


class CustomTrain(LSUNBase):
    """The middle square of each picture that the file lists, size x size pixels: {image: float32 in [-1, 1], paths}."""

    def __init__(self, size: int, training_images_list_file: str):
        super().__init__(training_images_list_file, "", size, flip_p=0.0)


class CustomTest(LSUNBase):
    """As CustomTrain, of another list."""

    def __init__(self, size: int, test_images_list_file: str):
        super().__init__(test_images_list_file, "", size, flip_p=0.0)
