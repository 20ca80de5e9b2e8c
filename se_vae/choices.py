"""The names that settings may take, apart from the code they choose.

A binary lists them in its flags, and must not load JAX to answer --help.
"""

DATASETS = ('mnist', 'color_mnist', 'fashion_mnist', 'mnist_5k', 'color_mnist_5k')
ARCHS = ('mlp', 'convnet')
COVARIANCES = ('diagonal', 'full')
OBJECTIVES = ('vae', 'se')
ATTACK_DTYPES = ('float32', 'bfloat16')
PRECISIONS = ('default', 'high', 'highest')
OPTIMIZERS = ('adam', 'sgd')
SCHEDULES = ('constant', 'cosine')
SUITES = ('standard', 'worst_case')
