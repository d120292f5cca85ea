"""IMPACTX in one process, without Ray and MLflow: train, explain, train again, predict with a map for each image.

python docs/example.py      under a minute on two cores; scikit-learn's embedded digits, nothing is downloaded
"""

import impactx
from impactx import AugmentationSettings, DatasetSettings, ModelSettings, TrainingSettings

data = impactx.load_dataset(DatasetSettings(name="digits", source="digits", subset=400), data_root="data")
training = TrainingSettings(epochs=15)
schedule = impactx.Schedule(learning_rate=0.002, augmentation=AugmentationSettings(flip=False))  # a mirrored digit is none

a = impactx.train_classifier(data, ModelSettings(name="lenet5", architecture="lenet5"), training, schedule)
maps = impactx.explain_dataset(a, data, impactx.Partition(max_evals=100))  # SHAP values, (400, 3, 32, 32)
net = impactx.train_impactx(a, data, maps, training, weight=0.8)
net.save("impactx-digits.pt")

test = data.load_test()
found = impactx.load_model("impactx-digits.pt").predict(test.images)  # uint8 images; one forward pass
print(f"accuracy {(found.labels == test.labels).mean():.3f} on {len(test)} test images, maps {found.maps.shape}")
