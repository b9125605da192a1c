"""The feed gives the rows of this process of each batch, whether it was prepared before or not."""

import numpy as np
import torch

from timemix.data.batches import Batches
from timemix.runtime.distributed import World
from timemix.training.feed import Feed


def test_the_feed_gives_each_batch_prepared_or_not():
    batches = Batches(np.arange(200), batch_size=6, ctx_len=8, seed=3)
    feed = Feed(batches, 6, World(1, 3), torch.device("cpu"))
    for step, prepare in ((0, 1), (1, 1), (2, 5), (3, 4)):
        for got, expected in zip(feed(step), batches(step, slice(2, 4)), strict=True):
            np.testing.assert_array_equal(got, expected)
        feed.prepare(prepare)
