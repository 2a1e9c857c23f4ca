"""The reader of compiled programs against small ones whose kernels can be counted by hand; see golden/README.md.

The toy's layer is silu(x @ w) @ w.T with x [8, 256] and w [256, 512] in bfloat16; its cache is [8, 64, 256].
"""

import pathlib

import pytest

from cascade_jax.measure import hlo
from cascade_jax.measure.kernels import body, kernels

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hlo"
WEIGHTS, ROWS, PRODUCT = 2 * 256 * 512, 2 * 8 * 256, 2 * 8 * 256 * 512


def text(name: str) -> str:
    return (GOLDEN / f"{name}.txt").read_text()


def phases(found) -> dict[str, int]:
    counts = {}
    for kernel in found:
        counts[kernel.phase] = counts.get(kernel.phase, 0) + kernel.times * kernel.launched
    return counts


def test_a_turn_of_the_open_loop_has_each_kernel_as_often_as_it_runs():
    """Three drafted layers of five kernels, one of three and a slice, one write of the cache, and a copied counter."""
    found = body(text("cuda-loop"), "cuda")
    assert phases(found) == {"draft": 3 * 5 + 1, "target": 4, "commit": 1, "other": 1}
    assert {k.times for k in found if "gemm" in k.name and k.phase == "draft"} == {3}


def test_products_are_counted_in_operations_and_bytes():
    first, second = (k for k in body(text("cuda-loop"), "cuda") if "gemm" in k.name and k.phase == "target")
    assert first.flops == second.flops == PRODUCT
    assert first.bytes == WEIGHTS + ROWS + 2 * ROWS  # reads w and x, writes [8, 512]
    assert second.bytes == WEIGHTS + 2 * ROWS + 8 * 2 * ROWS  # split in eight, which are summed afterwards


def test_of_a_cache_that_is_written_in_place_the_new_row_alone_counts():
    (write,) = (k for k in body(text("cuda-loop"), "cuda") if k.phase == "commit")
    parts = 8 * 8 * 256 * 4  # the second product's, float32
    assert write.bytes == parts + ROWS + ROWS + 4  # with what is added to it, the row itself, and where it goes
    assert write.shape == "bf16[8,64,256]"


def test_a_kernel_knows_the_lines_of_the_package_that_it_came_from():
    product = next(k for k in body(text("cuda-loop"), "cuda") if "gemm" in k.name and k.phase == "target")
    assert [(f.file, f.line, f.function) for f in product.frames] == [
        ("toy.py", 3, "layer"), ("toy.py", 9, "step"), ("toy.py", 14, "loop"),
    ]  # fmt: skip


def test_a_tpus_loop_is_counted_by_its_condition_and_its_fused_products_one_by_one():
    layers = [k for k in kernels(text("tpu-step"), "tpu") if k.flops]
    assert [(k.phase, k.times, k.flops) for k in layers] == [("draft", 3, 2 * PRODUCT), ("target", 1, 2 * PRODUCT)]
    assert {k.bytes for k in layers} == {WEIGHTS}  # activations stay in the vector memory


def test_a_tpus_transfers_move_bytes_beside_the_computation():
    transfers = [k for k in kernels(text("tpu-step"), "tpu") if k.operation == "copy-start"]
    assert {k.bytes for k in transfers} == {ROWS}
    assert not any(k.launched for k in transfers)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_exchanges_between_devices_are_found(platform):
    (exchange,) = (k for k in kernels(text(f"{platform}-mesh"), platform) if k.collective)
    assert (exchange.collective, exchange.group, exchange.exchanged) == ("all-reduce", 2, ROWS)


@pytest.mark.parametrize(
    "groups", ["replica_groups={{0,1,2,3}}", "replica_groups=[2,4]<=[8]", "replica_groups=mesh['a'=2, 'b'=4] {'b'}"]
)
def test_groups_are_read_in_every_way_that_they_are_written(groups):
    program = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  ROOT %r = f32[8]{{0}} all-reduce(%p), {groups}\n}}\n"
    assert [k.group for k in kernels(program, "cuda")] == [4]


def test_the_dearer_branch_of_a_choice_counts():
    program = """
%small (a: f32[2]) -> f32[2] {
  ROOT %s = f32[2]{0} copy(%a)
}

%large (b: f32[2]) -> f32[64] {
  %c = f32[64]{0} broadcast(%b)
  ROOT %d = f32[64]{0} copy(%c)
}

ENTRY %main (i: s32[], x: f32[2]) -> f32[64] {
  ROOT %choice = f32[64]{0} conditional(%i, %x, %x), branch_computations={%small, %large}
}
"""
    assert [k.name for k in kernels(program, "cuda")] == ["c", "d"]


def test_what_a_custom_call_updates_in_place_is_not_counted():
    program = """ENTRY %main (cache: f32[512], row: f32[4]) -> (f32[512], s32[2]) {
  %cache = f32[512]{0} parameter(0)
  %row = f32[4]{0} parameter(1)
  ROOT %c = (f32[512]{0}, s32[2]{0}) custom-call(%row, %cache), custom_call_target="write", ALIASES
}
"""
    aliases = "output_to_operand_aliasing={{0}: (1, {})}"
    (found,) = kernels(program.replace("ALIASES", aliases), "cuda")
    assert (found.operation, found.bytes) == ("write", 4 * 4 + 2 * 4)


@pytest.mark.parametrize(
    ("shape", "bytes_"),
    [("bf16[2,8]{1,0}", 32), ("(f32[3], s32[]{:T(128)})", 16), ("s4[3]{0}", 2), ("f8e4m3fn[4]", 4), ("pred[5]", 5)],
)
def test_sizes_of_types(shape, bytes_):
    assert hlo.size(shape) == bytes_


def test_what_lies_on_the_chip_takes_no_memory():
    assert hlo.size("(bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, bf16[4]{0:T(128)})", on_chip_free=True) == 8


def test_a_strided_and_padded_convolution_leaves_its_padding_out():
    program = """ENTRY %main (x: f32[1,5,3], w: f32[3,3,7]) -> f32[1,3,7] {
  %x = f32[1,5,3]{2,1,0} parameter(0)
  %w = f32[3,3,7]{2,1,0} parameter(1)
  ROOT %y = f32[1,3,7]{2,1,0} convolution(%x, %w), window={size=3 stride=2 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""
    (found,) = kernels(program, "cuda")
    assert found.flops == 2 * 3 * 7 * (2 + 3 + 2)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        kernels("HloModule nothing", "cuda")
    with pytest.raises(ValueError, match="no loop"):
        body(text("cuda-mesh"), "cuda")
