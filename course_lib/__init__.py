"""The library of the course. Its parts:

diffusion        Part 1: schedule, DDPM, UNet, samplers, guidance, training on pixels
latent           Part 2: autoencoder, Stable Diffusion as one object, text, the registry of base models
editing          Part 3: attention maps, read and changed
personalization  Part 4: pictures, a recipe for each method, one training loop, concepts as files
evaluation       scores, the judge, statistics, the rules of the claims
toybox, data     the drawn world; CIFAR-10
cli, plots, environment   the command; pictures for notebooks; the machine, its paths and its precision
"""
