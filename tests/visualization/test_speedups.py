import io

from mmattn.visualization import plot_speedups, plot_steps


def test_a_bar_for_each_ratio_with_its_value():
    figure = plot_speedups(['one', 'two'], {'forward': [2, 0.5], 'step': [30, 4]}, 'a machine')
    (axes,) = figure.axes
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == [2, 0.5, 30, 4]
    assert {text.get_text() for text in axes.texts} == {'2.0', '0.5', '30.0', '4.0'}
    assert [label.get_text() for label in axes.get_yticklabels()] == ['one', 'two']
    assert 'a machine' in figure.get_suptitle()
    figure.savefig(io.BytesIO())


def test_steps_stand_together_by_name_and_say_where_memory_did_not_suffice():
    rows = [('a', 'old', 400.0, 30.0), ('a', 'new', 100.0, 10.0), ('b', 'old', None, None)]
    time, memory = plot_steps(rows, 'a machine').axes
    assert [bar.get_width() for bar in time.patches] == [400, 0, 100]
    assert [text.get_text() for text in memory.texts] == ['30', 'out of memory', '10']
    assert [label.get_text() for label in time.get_yticklabels()] == ['a', 'b']
    assert [text.get_text() for text in time.get_legend().texts] == ['old', 'new']
    ys = [bar.get_y() + bar.get_height() / 2 for bar in time.patches]
    assert ys[2] - ys[0] == 1 and ys[1] - ys[2] > 1
