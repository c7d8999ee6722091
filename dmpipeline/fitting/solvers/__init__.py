"""LASSO paths and their certificates, on processors and on a torch device. They know no datamodels."""
