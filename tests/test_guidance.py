"""Guidance against closed forms, and networks and prompts of classes."""

import pytest
import torch
from torch.distributions import Normal

from latent_ext.guidance import ClassUNet, guided, labels_of
from processes import NoiseSchedule, add_noise, sample

CATS = {"fur": ("black", "white"), "eyes": ("green", "blue"), "background": ("green", "blue", "pink")}
SMALL = {"widths": (8, 16), "attention": (True, True), "heads": 2, "groups": 4}
X, T = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 50, 999])


def linear(x, t, context):
    """A predict_noise whose answer is known at sight."""
    return 0.5 * x + 0.001 * t.view(-1, 1, 1, 1) + context.sum(1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, -2.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_each_scale_is_a_straight_line_from_nothing_through_the_condition(scale, rows):
    context = torch.tensor([[1.0, 2.0], [0.0, 5.0], [-1.0, 0.5]])
    nothing = torch.tensor([[0.1, 0.2], [0.3, 0.3], [7.0, 7.0]])[:rows]  # one for all, or one for each image
    there, back = linear(X, T, context), linear(X, T, nothing.expand(3, 2))
    got = guided(linear, context, nothing, scale)(X, T)
    torch.testing.assert_close(got, scale * there + (1 - scale) * back)


def test_one_call_for_both_nothing_first():
    calls = []

    def spy(x, t, context):
        calls.append((x, t, context))
        return x

    context, nothing = torch.randn(3, 5, 7), torch.randn(1, 5, 7)
    guided(spy, context, nothing, 3.0)(X, T)
    ((x, t, both),) = calls
    assert torch.equal(x, torch.cat([X, X])) and torch.equal(t, torch.cat([T, T]))
    assert torch.equal(both, torch.cat([nothing.expand(3, 5, 7), context]))


def test_scale_1_asks_once_and_without_nothing():
    calls = []

    def spy(x, t, context):
        calls.append(context)
        return x

    context = torch.randn(3, 5, 7)
    guided(spy, context, torch.randn(1, 5, 7))(X, T)
    assert len(calls) == 1 and calls[0] is context


def normal_classes(schedule, mean, spread):
    """The exact predict_noise for a number that is normal around mean[c] if it is of class c, and any c with label 0."""

    def predict_noise(x, t, labels):
        ab = schedule.alpha_bar.double()[t].view(-1, 1)
        means, variance = ab.sqrt() * mean, ab * spread**2 + 1 - ab  # (B, classes)
        possible = (labels == 0) | (labels == 1 + torch.arange(len(mean)))
        share = torch.where(possible, -((x - means) ** 2) / (2 * variance), -torch.inf).softmax(1)
        return (1 - ab).sqrt() * (share * (x - means)).sum(1, keepdim=True) / variance

    return predict_noise


def test_at_scale_1_each_class_is_drawn_as_it_is_and_at_0_all_of_them():
    """The exact denoiser, so the sampler's pictures are the class: 1,000 even quantiles walk to quantiles."""
    mean, spread = torch.tensor([-0.6, 0.1, 0.9], dtype=torch.float64), 0.2
    predict_noise = normal_classes(NoiseSchedule.cosine(), mean, spread)
    even = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    noise, nothing = Normal(0.0, 1.0).icdf(even), torch.zeros(1, 1, dtype=torch.long)
    for c in range(3):
        labels = torch.full((1000, 1), c + 1)
        x = sample(guided(predict_noise, labels, nothing, 1.0), noise, NoiseSchedule.cosine(), steps=200, eta=0)
        assert x.mean().item() == pytest.approx(mean[c].item(), abs=0.01) and x.std().item() == pytest.approx(spread, abs=0.01)
    drawn = sample(guided(predict_noise, labels, nothing, 0.0), noise, NoiseSchedule.cosine(), steps=200, eta=0)
    nearest = (drawn - mean).abs().argmin(1).bincount() / len(drawn)
    torch.testing.assert_close(nearest, torch.full((3,), 1 / 3), atol=0.02, rtol=0)


def test_more_guidance_leaves_fewer_doubts():
    """Two classes that overlap: the share of pictures that are nearer to the other class falls with the scale."""
    mean = torch.tensor([-0.4, 0.4], dtype=torch.float64)
    predict_noise = normal_classes(NoiseSchedule.cosine(), mean, 0.5)
    noise = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wrong = []
    for scale in (0.0, 1.0, 2.0, 4.0):
        context, nothing = torch.full((2000, 1), 2), torch.zeros(1, 1, dtype=torch.long)
        x = sample(guided(predict_noise, context, nothing, scale), noise, NoiseSchedule.cosine(), steps=50, eta=0)
        wrong.append((x < 0).double().mean().item())
    assert wrong[0] == pytest.approx(0.5, abs=0.05) and wrong[1] == pytest.approx(0.212, abs=0.03)  # 0.4 / 0.5 spreads away
    assert wrong[0] > wrong[1] > wrong[2] + 0.05 and wrong[2] > wrong[3]


# ---- a U-Net of classes ---------------------------------------------------------------------------------------------


def make():
    torch.manual_seed(0)
    net = ClassUNet(CATS, context_width=6, **SMALL)
    for p in net.parameters():
        if not p.any():  # the zeros at the ends of blocks: nothing would pass
            torch.nn.init.normal_(p, std=0.1)
    return net


X_T, LABELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 2, 3], [2, 0, 1]])


@torch.no_grad()
def test_without_labels_nothing_is_said():
    net = make()
    assert torch.equal(net(X_T, T[:2]), net(X_T, T[:2], torch.zeros(2, 3, dtype=torch.long)))
    assert not torch.equal(net(X_T, T[:2]), net(X_T, T[:2], LABELS))


@torch.no_grad()
def test_each_question_matters_and_each_answer():
    net = make()
    for question, answers in enumerate(CATS.values()):
        labels = torch.zeros(1 + len(answers), 3, dtype=torch.long)
        labels[:, question] = torch.arange(1 + len(answers))
        x = X_T[:1].expand(len(labels), -1, -1, -1)
        answers = net(x, torch.full((len(labels),), 50), labels).flatten(1)
        assert torch.pdist(answers).min() > 1e-3


@torch.no_grad()
def test_each_image_has_its_own_labels_so_they_can_be_left_out_one_by_one():
    net = make()
    labels = LABELS * torch.tensor([[1], [0]])  # the second image's are left out
    both = net(X_T, T[:2], labels)
    torch.testing.assert_close(both[:1], net(X_T[:1], T[:1], LABELS[:1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1:], net(X_T[1:], T[1:2]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_labels_are_a_context_for_guided():
    net = make()
    predict_noise = guided(net, LABELS, torch.zeros(1, 3, dtype=torch.long), 2.0)
    expected = 2 * net(X_T, T[:2], LABELS) - net(X_T, T[:2])
    torch.testing.assert_close(predict_noise(X_T, T[:2]), expected, atol=1e-5, rtol=1e-5)
    assert sample(predict_noise, X_T, NoiseSchedule.cosine(), steps=2).isfinite().all()


def test_everything_learns_also_what_stands_for_nothing():
    net = make()
    x_t, noise = add_noise(X_T, T[:2], NoiseSchedule.cosine())
    ((net(x_t, T[:2], LABELS) - noise).square().sum() + net(x_t, T[:2]).square().sum()).backward()
    for name, p in net.named_parameters():
        assert p.grad.abs().max() > 0, name
    for embed in net.answers:
        assert embed.weight.grad[0].any()


def test_config_rebuilds_the_network():
    net = make()
    again = ClassUNet(**net.config)
    again.load_state_dict(net.state_dict())
    assert again.config == net.config


# ---- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ("", [0, 0, 0]),
        ("black", [1, 0, 0]),
        ("white fur", [2, 0, 0]),
        ("blue eyes", [0, 2, 0]),
        ("  WHITE Fur ,blue EYES,, pink", [2, 2, 3]),
        ("green background, green eyes", [0, 1, 1]),  # any order
    ],
)
def test_a_prompt_of_answers(prompt, labels):
    assert labels_of(prompt, CATS) == labels


def test_a_single_question_needs_no_name():
    digits = {"digit": tuple("0123456789")}
    assert labels_of("7", digits) == labels_of("7 digit", digits) == [8] and labels_of("0", digits) == [1]


def test_a_question_that_is_answered_twice_is_named():
    with pytest.raises(ValueError, match="one answer for eyes"):
        labels_of("green eyes, blue eyes", {"eyes": ("green", "blue")})


def test_an_answer_of_several_questions_needs_a_name():
    with pytest.raises(ValueError, match=r"'green': expected 'green' \+ eyes or 'green' \+ background.* all of them"):
        labels_of("black, green", CATS)


@pytest.mark.parametrize("prompt", ["purple", "7", "black cat", "green fur"])
def test_an_unknown_answer_gets_one_sentence_with_all_that_are_known(prompt):
    with pytest.raises(ValueError, match=rf"'{prompt}': this model has no such class.*fur: black, white; eyes: green, blue;"):
        labels_of(prompt, CATS)
