"""Means of checkpoints: the values, and what cannot be averaged."""

import pytest
import torch
from conftest import tiny_config, tiny_model
from transformers import AutoModel

from salmonn_hf.model.quantizer_salmonn import quantize_in_place
from salmonn_hf.training.averaging import average_checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    """Three models of one config whose floating-point tensors are all 1, 2 and 6."""
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 6.0)):
        model = tiny_model(tiny_config(ctc_vocab_size=4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
            model.projector.ctc_head.token_ids.fill_(7)
        model.save_pretrained(tmp_path / name)
    return [str(tmp_path / name) for name in "abc"]


def test_the_mean_of_three(checkpoints, tmp_path):
    average_checkpoints(checkpoints).save_pretrained(tmp_path / "mean")
    mean = AutoModel.from_pretrained(tmp_path / "mean")
    assert all((parameter == 3.0).all() for parameter in mean.parameters())
    assert (mean.projector.ctc_head.token_ids == 7).all()


def test_bfloat16_is_rounded_once(tmp_path):
    """Sums of bfloat16 in bfloat16 would lose what is small beside them."""
    values = [256.0] + [1.0] * 3
    for number, value in enumerate(values):
        model = tiny_model().to(torch.bfloat16)
        model.projector.proj.weight.data.fill_(value)
        model.save_pretrained(tmp_path / str(number))
    mean = average_checkpoints([str(tmp_path / str(number)) for number in range(4)])
    assert mean.dtype == torch.bfloat16
    assert (mean.projector.proj.weight == torch.tensor(64.75).bfloat16()).all()


def test_one_checkpoint_has_no_mean(checkpoints):
    with pytest.raises(ValueError, match="two checkpoints or more"):
        average_checkpoints(checkpoints[:1])


def test_other_shapes_are_named(checkpoints, tmp_path):
    other = tiny_config(ctc_vocab_size=4, window_frames=4, window_stride=4, frame_mlp_size=8)
    tiny_model(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other and .*a differ in projector.frame_.* other tensors; only"):
        average_checkpoints([checkpoints[0], str(tmp_path / "other")])


def test_quantised_checkpoints_are_refused(checkpoints, tmp_path):
    model = tiny_model()
    quantize_in_place(model, {"projector": {"bits": 8}})
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="small is quantised; take the mean of what it was made from"):
        average_checkpoints([str(tmp_path / "small"), str(tmp_path / "small")])
