import io

from mmattn.visualization import plot_speedups


def test_a_bar_for_each_ratio_with_its_value():
    figure = plot_speedups(['one', 'two'], {'forward': [2, 0.5], 'step': [30, 4]}, 'a machine')
    (axes,) = figure.axes
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == [2, 0.5, 30, 4]
    assert {text.get_text() for text in axes.texts} == {'2.0', '0.5', '30.0', '4.0'}
    assert [label.get_text() for label in axes.get_yticklabels()] == ['one', 'two']
    assert 'a machine' in figure.get_suptitle()
    figure.savefig(io.BytesIO())
