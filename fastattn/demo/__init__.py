"""`make demo`: English to Chinese, learnt with fastattn's attention and compared with PyTorch's.

recipe says what is trained and how; text, train and checkpoint do it; measure times steps; judge says what
was learnt; results and plot say what came out. fastattn.cli.demo runs them in order.
"""
