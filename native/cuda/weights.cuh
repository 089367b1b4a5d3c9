/* A model's weights in device memory. */
#ifndef DG_CUDA_WEIGHTS_CUH
#define DG_CUDA_WEIGHTS_CUH

#include "cuda/device.cuh"

/* dg_model.backend_data */
struct DeviceModel {
    char *arena = nullptr; /* the one allocation that every weight and vector of the model lies in: layout.h */
    const float *frequencies = nullptr; /* (n_layers, frequency_stride) of the rotation */
    int frequency_stride = 0;
    int n_multiprocessors = 0;
};

/* dg_backend_ops.load_model and unload_model */
dg_status load_model(dg_model *model, const dg_model_params *params, dg_error *error);
void unload_model(dg_model *model);

#endif
