"""Axes, units and values of the benchmarks' charts."""

import io

import numpy as np

from benchmarks.charts import plot_growth, plot_memory, plot_scaling, plot_speedups, plot_steps


def test_scaling_has_labels_and_units():
    tokens = [1024, 4096]
    figure = plot_scaling(
        {'quadtree': (tokens, [0.1, 0.4]), 'full': (tokens, [0.1, 1.6])},
        {'quadtree': (tokens, [2**20, 4 * 2**20]), 'full': (tokens, [2**20, 16 * 2**20])},
        {'sharp': ([1, 4], [0.5, 0.1]), 'flat': ([1, 4], [2.0, 1.0])},
        'cost and error',
        'on a machine',
    )
    left, middle, right = figure.axes
    assert [axes.get_xscale() for axes in figure.axes] == ['log'] * 3
    assert [axes.get_yscale() for axes in figure.axes] == ['log'] * 3
    assert left.get_ylabel().endswith('(s)') and middle.get_ylabel().endswith('(MiB)')
    assert [text.get_text() for text in left.get_xticklabels()] == ['32²', '64²']
    legend = [text.get_text() for text in left.get_legend().texts]
    assert legend == ['quadtree', 'full', 'slope 1', 'slope 2']
    np.testing.assert_allclose(left.lines[1].get_xydata(), [[1024, 0.1], [4096, 1.6]])
    np.testing.assert_allclose(middle.lines[1].get_xydata(), [[1024, 1], [4096, 16]])
    # The slope guides start at the lowest first value.
    np.testing.assert_allclose(left.lines[2].get_ydata(), [0.1, 0.4])
    np.testing.assert_allclose(left.lines[3].get_ydata(), [0.1, 1.6])
    assert [text.get_text() for text in right.get_legend().texts] == ['sharp', 'flat']
    assert figure.get_suptitle() == 'cost and error' and figure.get_supxlabel() == 'on a machine'
    assert left.lines[0].get_color() == middle.lines[0].get_color() != right.lines[0].get_color()


def test_growth_has_labels_and_units():
    figure = plot_growth(
        {'a': ([4096, 65536], [0.1, 1.6])}, {'a': ([4096, 65536], [2**20, 2**24])}, 'on a machine'
    )
    time, memory = figure.axes
    assert time.get_ylabel().endswith('(s)') and memory.get_ylabel().endswith('(MiB)')
    assert [text.get_text() for text in time.get_xticklabels()] == ['64²', '256²']
    np.testing.assert_allclose(memory.lines[0].get_xydata(), [[4096, 1], [65536, 16]])
    np.testing.assert_allclose(time.lines[1].get_ydata(), [0.1, 1.6])


def test_memory_has_a_panel_for_each_model_and_mib():
    record = dict(allocated=[2**20, 2**21], resident=[2**22, 2**22], size=[(100, 200), (64, 1000)])
    figure = plot_memory(dict(gcvit=record, dat=record), 1, 'two steps')
    assert [axes.get_title() for axes in figure.axes] == ['gcvit', 'dat', '', '']
    upper, lower = figure.axes[1], figure.axes[3]
    labels = [text.get_text() for text in upper.get_legend().texts]
    assert labels == ['resident (last: 4)', 'allocated (last: 2)']
    np.testing.assert_allclose(upper.lines[1].get_xydata(), [[1, 1], [2, 2]])
    np.testing.assert_allclose(lower.lines[0].get_xydata(), [[1, 20], [2, 64]])


def test_a_bar_for_each_ratio_with_its_value():
    figure = plot_speedups(['one', 'two'], {'forward': [2, 0.5], 'step': [30, 4]}, 'a machine')
    (axes,) = figure.axes
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == [2, 0.5, 30, 4]
    assert {text.get_text() for text in axes.texts} == {'2.0', '0.5', '30.0', '4.0'}
    assert [label.get_text() for label in axes.get_yticklabels()] == ['one', 'two']
    assert 'a machine' in figure.get_suptitle()
    figure.savefig(io.BytesIO())


def test_steps_are_grouped_by_name_and_mark_out_of_memory():
    rows = [('a', 'old', 400.0, 30.0), ('a', 'new', 100.0, 10.0), ('b', 'old', None, None)]
    time, memory = plot_steps(rows, 'a machine').axes
    assert [bar.get_width() for bar in time.patches] == [400, 0, 100]
    assert [text.get_text() for text in memory.texts] == ['30', 'out of memory', '10']
    assert [label.get_text() for label in time.get_yticklabels()] == ['a', 'b']
    assert [text.get_text() for text in time.get_legend().texts] == ['old', 'new']
    ys = [bar.get_y() + bar.get_height() / 2 for bar in time.patches]
    assert ys[2] - ys[0] == 1 and ys[1] - ys[2] > 1
