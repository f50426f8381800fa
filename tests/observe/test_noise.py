from __future__ import annotations

import pytest

from janus_cluster.observe.noise import Kind, classify, shorten_bar

C10D = "[W1121 14:01:20.299042991 socket.cpp:207] [c10d]"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("step 3/20 loss 8.372 action 1.286 lr 1.0e-03 step_time_s 0.47", "step"),
        ("step 20: held-out action accuracy 0.00 (majority class 0.40)", None),
        ("step by step", None),
        ("Loading checkpoint shards:  25%|██▌       | 1/4 [00:01<00:05,  1.90s/it]", "bar"),
        ("  0%|          | 0/250 [00:00<?, ?it/s]", "bar"),
        ("100%|██████████| 1.20M/1.20M [00:00<00:00, 9.6MB/s]", "bar"),
        ("12it [00:03,  3.90it/s]", "bar"),
        ("50% of the samples | 3/4 [sic]", None),
        ("[2026-11-21 14:01:43,623] [INFO] [config.py:1001:print]   train_batch_size ....... 64", "chatter"),
        ("[2026-11-21 14:01:43,623] [WARNING] [engine.py:1:f] lr is 0", None),
        ("h800-01:4711:4802 [3] NCCL INFO Channel 00/0 : 3[3] -> 4[4] via P2P/CUMEM", "chatter"),
        ("h800-01:4711:4802 [3] NCCL WARN Cuda failure 'out of memory'", None),
        (f"{C10D} The hostname of the client socket cannot be retrieved. err=-3", "chatter"),
        (f"[rank3]:{C10D} The hostname of the client socket cannot be retrieved. err=-3", "chatter"),
        (f"{C10D} The client socket has timed out after 60000ms", None),
        ("RuntimeError: bad", None),
        ("", None),
    ],
)
def test_noise_is_distinguished_from_what_is_to_be_read(text: str, kind: Kind | None) -> None:
    assert classify(text) == kind


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("Loading checkpoint shards:  25%|██▌       | 1/4 [00:01<00:05,  1.90s/it]", "Loading checkpoint shards 25%"),
        ("  7%|          | 0/250 [00:00<?, ?it/s]", "7%"),
        ("12it [00:03,  3.90it/s]", "12it [00:03,  3.90it/s]"),
    ],
)
def test_a_bar_in_short_is_its_name_and_percentage(text: str, short: str) -> None:
    assert shorten_bar(text) == short
