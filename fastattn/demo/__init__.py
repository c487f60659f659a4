"""`make demo`: a language model in plain PyTorch, trained with PyTorch's attention and then with ours.

model, text and train make and train it; measure and memory time its steps and weigh them; report and plot say
what came out. fastattn.cli.demo runs them in order.
"""
