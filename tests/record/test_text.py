"""Text from outside on one line, whatever is in it."""

from hypothesis import given
from hypothesis import strategies as st

from fuseplan.record import Fusion, GraphReport, Reason, Report
from fuseplan.record.text import LONGEST_QUOTE, one_line, printable, shown

FUSION = Fusion(
    rule="act_padding", op="rms_norm_pad", provider="torch", anchor="pad", consumed=("a", "b"), contested_op="rms_norm",
    site="rms_norm", source="layers.0",
)  # fmt: skip
GRAPH = GraphReport(graph="graph_0", range=(1, 8), applied=(FUSION,), matched={"act_padding": 1})
REPORT = Report(policy="planned", order=(), rules=("act_padding",), graphs=(GRAPH,))


def test_what_is_no_text_is_written_as_python_writes_it() -> None:
    assert printable("layers.0 · µ漢") == "layers.0 · µ漢"
    assert printable("a\x1b[31mb\n\r\x07\u202e\udce4\x9b") == r"a\x1b[31mb\n\r\x07\u202e\udce4\x9b"


@given(st.text(alphabet=st.characters()))
def test_whatever_is_said_is_one_printable_line(text: str) -> None:
    assert printable(text).isprintable()
    assert one_line(text).isprintable()
    assert len(one_line(text)) <= LONGEST_QUOTE


def test_long_texts_are_cut_and_say_so() -> None:
    assert one_line("x" * 1000, longest=10) == "xxxxxxx..."
    assert one_line(" two\n lines ") == "two lines"


def test_a_record_that_can_be_shown_is_itself() -> None:
    assert shown(REPORT) is REPORT


def test_names_in_a_record_are_shown_as_python_writes_them() -> None:
    hostile = "layers.0\x1b[2J"
    report = Report(
        policy="planned", order=(), rules=(hostile,),
        graphs=(GraphReport(graph="graph_0", matched={hostile: 1}, applied=(FUSION,)),),
    )  # fmt: skip
    stored = shown(report)
    assert stored.rules == (r"layers.0\x1b[2J",)
    assert stored.graphs[0].matched == {r"layers.0\x1b[2J": 1}
    assert stored.graphs[0].applied[0] is FUSION
    assert stored.graphs[0].range is None
    assert shown((Reason.DTYPE, 1, None)) == (Reason.DTYPE, 1, None)
