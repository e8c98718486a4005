"""The dataset class that web-scale text-to-image data derives from."""

from collections.abc import Iterator, Sequence

from torch.utils.data import IterableDataset


class Txt2ImgIterableBaseDataset(IterableDataset):
    """Chains of records that a training run splits over its workers.

    `valid_ids` names the records at hand; a worker's share of them stands in `sample_ids`. Derive and write `__iter__`.
    """

    def __init__(self, num_records: int = 0, valid_ids: Sequence | None = None, size: int = 256):
        super().__init__()
        self.num_records = num_records
        self.valid_ids = valid_ids
        self.sample_ids = valid_ids
        self.size = size

    def __len__(self) -> int:
        return self.num_records

    def __iter__(self) -> Iterator[dict]:
        raise NotImplementedError(f"{type(self).__name__} must define __iter__, which yields one example after another")
