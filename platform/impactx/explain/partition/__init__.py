"""The batched partition engine: SHAP's partition values for many images at once."""
